"""The runs of this machine, read from their folders: state, steps, best held-out loss. It imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from sd3tune.config import yaml12
from sd3tune.config.run_folder import (
    CONFIG_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RUN_FILE,
    VALIDATION_FILE,
    is_run_folder,
    read_run_file,
)
from sd3tune.errors import RunError
from sd3tune.files.json import NotJson, parse_object
from sd3tune.files.own_json import is_number, is_whole_number, read_lines
from sd3tune.files.regular import open_regular, read_regular
from sd3tune.run.places import list_of_runs

State = Literal["running", "stopped", "finished", "failed"]
RUNS = Path("runs")
"""The default folder of runs, in the working directory."""
_DEPTH = 3
"""Levels of folders in which runs are searched."""
_TAIL = 2**16
"""Bytes of `metrics.jsonl` in which its last line lies."""


@dataclass(frozen=True)
class RunSummary:
    """A run as its folder shows it now."""

    folder: Path
    state: State
    """`stopped` on request, `finished`, or `failed`: by an error, killed, or with the machine."""
    step: int
    """Last step in the metrics, which are written every `train.log_every` steps; 0 before the first."""
    steps: int | None
    """Number of steps that were asked for; None if unknown."""
    saved: int | None
    """Step of the newest checkpoint, from which `--resume` continues; None without one."""
    best_loss: float | None
    """Lowest held-out loss; None if none was measured."""
    best_step: int | None
    active: float
    """Time of the last change, in seconds since 1970."""
    reason: str | None
    """Why it failed, in one line; None if unknown, as for a killed process."""


def list_runs(folders: Sequence[Path] = (RUNS,), everywhere: bool = True) -> list[RunSummary]:
    """Return the runs in `folders` and, if `everywhere`, those that this user began anywhere; last active first.

    A run's folder may lie up to three levels deep. Runs whose folder is gone are left out, and so are runs that are
    still encoding: their folder is written to when training begins.
    """
    found = [run for folder in folders for run in _runs_in(folder, _DEPTH)]
    found += remembered_runs() if everywhere else []
    by_place = {os.path.realpath(run): run for run in reversed(found)}
    return sorted(map(summarize_run, by_place.values()), key=lambda run: run.active, reverse=True)


def summarize_run(run: Path) -> RunSummary:
    """Return the state of the run in a folder; damaged files count as missing."""
    running = is_running(run)  # before its files are read, as it may end meanwhile
    facts, step, saved = read_run_file(run), _last_step(run / METRICS_FILE), _newest_checkpoint(run)
    ended = facts.get("ended")
    ended = ended if isinstance(ended, dict) else {}
    reason = ended.get("reason")
    best = min(_held_out_losses(run), default=None)
    return RunSummary(
        folder=run,
        state="running" if running else _state_after(facts, ended, step, saved),
        step=max(step, saved or 0),
        steps=_steps_asked(run, facts),
        saved=saved,
        best_loss=best and best[0],
        best_step=best and best[1],
        active=_last_change(run),
        reason=reason if isinstance(reason, str) and not running else None,
    )


def is_running(run: Path) -> bool:
    """Return True while a process trains in the folder, also if it belongs to another program or terminal.

    The system releases the lock of a process that dies. False if the lock cannot be opened, as with another user's run.
    """
    if not (run / LOCK_FILE).is_file():
        return False
    try:
        with FileLock(run / LOCK_FILE, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def remember_run(run: Path) -> None:
    """Add a run to this user's list, so that `list_runs` finds it from any folder; a failure is ignored."""
    line, file = json.dumps(str(run.absolute())), list_of_runs()
    with contextlib.suppress(OSError):
        if not file.exists() or line not in file.read_text("ascii").splitlines():
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="ascii") as opened:
                opened.write(f"{line}\n")


def remembered_runs() -> list[Path]:
    """Return the runs on this user's list whose folders are still there."""
    try:
        lines = read_regular(list_of_runs()).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            path = json.loads(line)
            if isinstance(path, str) and is_run_folder(Path(path)):
                found.append(Path(path))
    return found


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the run that `folder` is, or the runs below it. Links and hidden folders are not followed."""
    if is_run_folder(folder):
        yield folder
    elif depth:
        try:
            inside = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        except OSError:
            return
        for path in inside:
            if not os.path.basename(path).startswith("."):
                yield from _runs_in(Path(path), depth - 1)


def _state_after(facts: dict[str, Any], ended: dict[str, Any], step: int, saved: int | None) -> State:
    """Return the state of a run that no process trains.

    Earlier versions do not record how a run ended: it was stopped if the last step was saved, as a stop does.
    """
    if "report" in facts:
        return "finished"
    if ended.get("state") in ("stopped", "failed"):
        return "stopped" if ended["state"] == "stopped" else "failed"
    return "stopped" if saved is not None and saved >= step else "failed"


def _last_step(metrics: Path) -> int:
    """Return the step of the last whole line; 0 without one."""
    try:
        with open_regular(metrics, largest=None) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(NotJson):
            step = parse_object(line, plain=False).get("step")
            if step is not None and is_whole_number(step):
                return int(step)
    return 0


def _held_out_losses(run: Path) -> list[tuple[float, int]]:
    """Return (loss, step) of each measurement."""
    try:
        lines = read_lines(run / VALIDATION_FILE, lambda line: None)
    except RunError:
        return []
    return [
        (line["loss"], line["step"])
        for line in lines
        if is_number(line.get("loss")) and is_whole_number(line.get("step"))
    ]


def _newest_checkpoint(run: Path) -> int | None:
    names = (path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _steps_asked(run: Path, facts: dict[str, Any]) -> int | None:
    """Return the number of steps, which earlier versions wrote into the configuration only."""
    steps = facts.get("steps")
    if steps is None:
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml12.YamlError, LookupError, TypeError):
            steps = yaml12.parse(read_regular(run / CONFIG_FILE).decode()).value["train"]["steps"]
    return steps if is_whole_number(steps) else None


def _last_change(run: Path) -> float:
    times = [0.0]
    for name in (RUN_FILE, METRICS_FILE, VALIDATION_FILE, "checkpoints", "samples"):
        with contextlib.suppress(OSError):
            times.append((run / name).stat().st_mtime)
    return max(times)

"""`sd3tune runs`: list the runs of this machine, and the command that comes next."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from sd3tune import reporting
from sd3tune.errors import RunError
from sd3tune.invocation import command_line
from sd3tune.run.listing import RUNS, RunSummary, list_runs

_TITLES = ("run", "state", "steps", "best loss", "last active")


def run_runs(folders: Sequence[Path]) -> None:
    """Print a table of the runs in `folders`, by default of all that this user began. Raises RunError."""
    for folder in folders:
        if not folder.is_dir():
            raise RunError(f"{folder}: no such folder; name one that holds runs, such as {RUNS}")
    found = list_runs(folders, everywhere=False) if folders else list_runs()
    if not found:
        where = ", ".join(map(str, folders)) or f"{RUNS} or on the list of runs"
        reporting.say(f"no runs in {where}; start one: {command_line('sd3tune', 'train', 'CONFIG')}")
        return
    rows = [_TITLES, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    reporting.say(header)
    for line, run in zip(lines, found, strict=True):
        reporting.result(line, **asdict(run), next=next_command(run))
    reporting.say("", "next:", *_next_lines(found))


def run_folders() -> list[str]:
    """Return the folders of all runs, as a user would type them."""
    return [_short(run.folder) for run in list_runs()]


def next_command(run: RunSummary) -> str:
    """Return the command that a run's state suggests."""
    if run.state in ("running", "finished"):
        return command_line("sd3tune", "report", _short(run.folder))
    resume = [] if run.saved is None else ["--resume"]
    return command_line("sd3tune", "train", _short(run.folder / "config.yaml"), *resume)


def _next_lines(found: Iterable[RunSummary]) -> list[str]:
    """Return a line for each state: the next command of the run that was active last."""
    newest: dict[str, RunSummary] = {}
    for run in found:
        newest.setdefault(run.state, run)
    return [f"  {state:<8}  {next_command(run)}" for state, run in newest.items()]


def _row(run: RunSummary) -> tuple[str, ...]:
    steps = f"{run.step}" if run.steps is None else f"{run.step} of {run.steps}"
    best = "-" if run.best_loss is None else f"{run.best_loss:.4f} at {run.best_step}"
    return (_short(run.folder), run.state, steps, best, _ago(time.time() - run.active))


def _short(path: Path) -> str:
    """Return a path relative to the working directory if it lies below it."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now" if seconds < 60 else "a minute ago"

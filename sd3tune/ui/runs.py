"""A run as its folder shows it now: curves, previews, evaluation, memory. Everything is read anew; nothing is kept."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from sd3tune.config import yaml12
from sd3tune.config.run_folder import CONFIG_FILE, LOCK_FILE, METRICS_FILE, VALIDATION_FILE, is_run_folder
from sd3tune.errors import RunError
from sd3tune.files.json import NotJson
from sd3tune.files.own_json import read_lines, read_object
from sd3tune.files.regular import open_regular, read_regular
from sd3tune.publish.previews import PREVIEW_NAME, SAMPLES
from sd3tune.run.listing import RunSummary, remembered_runs
from sd3tune.ui.workspace import Outside, Workspace

EVALUATION = Path("eval", "eval.json")
EVALUATION_PICTURES = ("checkpoints.png", "nearest.png", "drift.png")
_MOST = 2 * 2**20
"""Bytes of metrics in one answer; the page asks again until it has all."""
_COLUMNS = ("loss", "lr", "grad_norm")
_BASE_NAME = re.compile(r"base-(\d+)\.png")


def places_of_runs(workspace: Workspace) -> list[Path]:
    """Return the folders in which the runs of the opened folders lie."""
    return [inside if (inside := folder / "runs").is_dir() else folder for folder in workspace.folders]


def known_run(workspace: Workspace, text: str) -> Path:
    """Return the run folder that the page names: in the opened folders, or on this user's list. Raises Outside."""
    path = Path(os.path.normpath(workspace.root / text))
    if "\0" not in text and (workspace.holds(path) or path in remembered_runs()):
        return path
    raise Outside(f"{text}: neither in the opened folders nor a run of yours")


def configuration(run: Path) -> str:
    """Return the text of a run's own configuration; empty if there is none."""
    try:
        return read_regular(run / CONFIG_FILE, 2**20).decode("utf-8", "replace")
    except OSError:
        return ""


def file_of_run(run: Path, name: str) -> Path:
    """Return a file inside a run folder, not through links that lead out of it. Raises Outside."""
    path = run / name
    if "\0" in name or not path.resolve().is_relative_to(run.resolve()) or not is_run_folder(run):
        raise Outside(f"{name[:200]}: not a file of the run {run.name}")
    return path.resolve()


def new_metrics(run: Path, at: str) -> dict[str, Any]:
    """Return the steps, losses, rates and norms behind the place `at` of an earlier answer, and the new place.

    With `reset`, they are the first ones: a resumed run rewrites its metrics. Steps without a finite value have None.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("step", *_COLUMNS)}
    try:
        with open_regular(run / METRICS_FILE, largest=None) as file:
            found = os.stat(run / METRICS_FILE)
            inode, _, offset = at.partition(":")
            start = int(offset) if inode == str(found.st_ino) and offset.isdecimal() else 0
            start = start if start <= found.st_size else 0
            file.seek(start)
            data = file.read(_MOST)
    except OSError:
        return {"at": "", "reset": at != "", "more": False, **columns}
    whole = data.rfind(b"\n") + 1
    for line in data[:whole].splitlines():
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, TypeError, LookupError):
            continue
        columns["step"].append(step)
        for name in _COLUMNS:
            columns[name].append(_finite(values.get(name)))
    return {"at": f"{found.st_ino}:{start + whole}", "reset": start == 0, "more": len(data) == _MOST, **columns}


def held_out(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the held-out loss, with and without the adapter, by sigma."""
    try:
        lines = read_lines(run / VALIDATION_FILE, lambda line: None)
    except RunError:
        return []
    return [plain(line) for line in lines]


def previews(run: Path) -> dict[str, Any]:
    """Return the previews of a run by step, those of the base, and the prompts."""
    found: list[dict[str, Any]] = []
    try:
        entries = list(os.scandir(run / SAMPLES))
    except OSError:
        entries = []
    for entry in entries:
        step, base = PREVIEW_NAME.fullmatch(entry.name), _BASE_NAME.fullmatch(entry.name)
        if step or base:
            number = int(step[2] if step else base[1] if base else 0)
            changed = entry.stat(follow_symlinks=False).st_mtime_ns // 1000
            found.append(
                {"name": entry.name, "step": int(step[1]) if step else None, "number": number, "changed": changed}
            )
    found.sort(key=lambda one: (-1 if one["step"] is None else one["step"], one["number"]))
    return {"pictures": found, "prompts": list(_prompts(run))}


def _prompts(run: Path) -> Iterator[str]:
    try:
        values = yaml12.parse(read_regular(run / CONFIG_FILE).decode()).value
        prompts = values["preview"]["prompts"]
    except (OSError, UnicodeDecodeError, yaml12.YamlError, LookupError, TypeError):
        return
    for one in prompts if isinstance(prompts, list) else ():
        yield str(one.get("prompt", "")) if isinstance(one, dict) else str(one)


def evaluation(run: Path) -> dict[str, Any] | None:
    """Return the verdict, a table and the pictures of `sd3tune eval`; None without an evaluation."""
    try:
        values = read_object(run / EVALUATION)
        rows = [(str(row["name"]), row["figures"]) for row in values["rows"]]
        columns = list(dict.fromkeys((m, e) for _, figures in rows for e, found in figures.items() for m in found))
        table = [[name, *(_figure(figures, *column) for column in columns)] for name, figures in rows]
        sentence = str(values["verdict"]["sentence"])
    except (OSError, NotJson, LookupError, TypeError, AttributeError, ValueError):
        return None
    pictures = [f"eval/{name}" for name in EVALUATION_PICTURES if (run / "eval" / name).is_file()]
    return {
        "sentence": sentence,
        "columns": ["", *(f"{measure}, {encoder}" for measure, encoder in columns)],
        "rows": table,
        "pictures": pictures,
    }


def _figure(figures: dict[str, Any], measure: str, encoder: str) -> str:
    found = figures.get(encoder, {}).get(measure)
    return "-" if found is None or found["mean"] is None else f"{found['mean']:.3f}"


def summary_json(workspace: Workspace, summary: RunSummary) -> dict[str, Any]:
    """Return a run of the listing for the page."""
    return {
        "run": str(summary.folder),
        "shown": workspace.shown(summary.folder),
        "name": summary.folder.name,
        "state": summary.state,
        "step": summary.step,
        "steps": summary.steps,
        "saved": summary.saved,
        "best_loss": _finite(summary.best_loss),
        "best_step": summary.best_step,
        "active": summary.active,
        "reason": summary.reason,
    }


def memory_of(run: Path, shell: int | None) -> dict[str, int] | None:
    """Return the memory of a run's processes in bytes, of the system and of the GPUs; None if they are not found.

    `shell` is the process id of the job's shell. Without, as for a run in a terminal, the process is found by its lock.
    """
    try:
        first = psutil.Process(shell) if shell is not None else _holder_of_lock(run)
        if first is None:
            return None
        processes = [first, *first.children(recursive=True)]
        system = sum(process.memory_info().rss for process in processes)
    except psutil.Error:
        return None
    return {"system": system, "gpu": _gpu_memory({process.pid for process in processes})}


def _holder_of_lock(run: Path) -> psutil.Process | None:
    lock = str((run / LOCK_FILE).resolve())
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid() or not any("sd3tune" in word for word in process.cmdline()):
                continue
            if any(file.path == lock for file in process.open_files()):
                return process
        except (psutil.Error, OSError):
            continue
    return None


def _gpu_memory(pids: set[int]) -> int:
    """Return the bytes that processes hold on GPUs, as `nvidia-smi` says; 0 without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    asked = [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    found = (line.split(",") for line in listed.splitlines())
    return sum(
        int(one[1]) * 2**20 for one in found if len(one) == 2 and one[1].strip().isdecimal() and int(one[0]) in pids
    )


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def plain(value: Any) -> Any:
    """Return a JSON value whose numbers are finite; others become None."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return _finite(value) if isinstance(value, float) else value

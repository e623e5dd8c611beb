"""The run folder: names of its files, the one around a configuration file, and the one of a rehearsal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sd3tune.config.schema import Config
from sd3tune.config.sections.model import OFFLINE_BASES
from sd3tune.config.shape import value_at
from sd3tune.config.tree import Origin, Tree
from sd3tune.files.json import NotJson
from sd3tune.files.own_json import read_object

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
METRICS_FILE, VALIDATION_FILE = "metrics.jsonl", "validation.jsonl"
LOCK_FILE = ".lock"
"""Locked by the process that trains in the folder."""
MARKER = "sd3tune_run"
"""Key that marks a `run.json` as written by a run; its value is the version of the folder's layout."""
LAYOUT_VERSION = 1
_KEY = ("output_dir",)
_BASE = ("model", "base")
_KEYS_BEFORE_MARKER = {"versions", "resumes", "timings"}
"""Keys of every `run.json` written before the marker was introduced."""
_RANDOM_BASES = {base for base in OFFLINE_BASES if base.startswith("tiny")}


def use_own_folder(tree: Tree, source: str) -> None:
    """Set `output_dir` of a run folder's own `config.yaml` to that folder, which may have been moved or copied.

    Call this before overrides are applied, so that they win. A copy of the file elsewhere keeps its `output_dir`.
    """
    file = Path(source).absolute()
    written = value_at(tree.values, _KEY)
    if file.name != CONFIG_FILE or not is_run_folder(file.parent) or not isinstance(written, str):
        return
    if os.path.realpath(file.parent.joinpath(os.path.expanduser(written))) == os.path.realpath(file.parent):
        return
    tree.write(_KEY, str(file.parent), Origin(source, tree.root.order, file.parent))
    tree.notes.append(f"{source} is in a run folder, so output_dir is {file.parent} and not {written}")


def use_rehearsal_folder(tree: Tree, own_base: object) -> None:
    """Set `output_dir` of a rehearsal to `runs/NAME-tiny`, so that it does not block the real run in `runs/NAME`.

    A rehearsal is a configuration whose overrides replace its `own_base` by a base with random weights. An overridden
    name or any `output_dir` is kept. Call this after overrides are applied.
    """
    base, name = value_at(tree.values, _BASE), tree.values.get("name", Config.model_fields["name"].default)
    if not _is_random(base) or _is_random(own_base):
        return
    if value_at(tree.values, _KEY) is not None or tree.origin(("name",)).override is not None:
        return
    folder = os.path.join("runs", str(name))
    tree.values["output_dir"] = os.path.abspath(f"{folder}-tiny")
    tree.notes.append(
        f"{tree.origin(_BASE).label}: a rehearsal: its folder is {folder}-tiny, so that {folder} stays free for the run"
    )


def _is_random(base: object) -> bool:
    return isinstance(base, str) and base in _RANDOM_BASES


def is_run_folder(folder: Path) -> bool:
    """Return True if a run has written into this folder; the `run.json` of another program does not count."""
    return "argv" in read_run_file(folder)


def read_run_file(folder: Path) -> dict[str, Any]:
    """Return the `run.json` of a run, or of its copy on the Hub, which lacks `argv`.

    Empty if the file is missing, unreadable or written by another program.
    """
    try:
        described = read_object(folder / RUN_FILE)
    except (OSError, NotJson):
        return {}
    is_marked = type(described.get(MARKER)) is int
    ours = is_marked or (MARKER not in described and described.keys() >= _KEYS_BEFORE_MARKER)
    return described if ours else {}

"""Trained weights in the opened folders: of runs, with their checkpoints, and files of other tools."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sd3tune.adapter.layouts import locate
from sd3tune.adapter.names import ADAPTER_FILE, CONTRACT_KEY, EMBEDDING_FILE
from sd3tune.config.run_folder import is_run_folder
from sd3tune.files.json import NotJson, parse_object, read_object
from sd3tune.files.tensor_header import BadHeader, read_header
from sd3tune.model.base.contract import CONTRACT_FILE
from sd3tune.publish.files import ADAPTERS, EMBEDDINGS, MODELS
from sd3tune.run.listing import list_runs
from sd3tune.ui.workspace import Workspace

Kind = Literal["adapter", "embedding", "model"]

FINAL = "final"
_STEP = re.compile(r"step-(\d+)")
_KINDS: tuple[tuple[Kind, tuple[str, ...], str], ...] = (
    ("adapter", ADAPTERS, ADAPTER_FILE),
    ("embedding", EMBEDDINGS, EMBEDDING_FILE),
    ("model", MODELS, "model_index.json"),
)
"""Kind, its folders in a run (those with EMA first), and the file that shows that one is complete."""
_SHOWN = ("base", "resolution", "sampling_steps", "guidance", "instance_prompt", "trigger")
"""Keys of the contract that the page shows."""


@dataclass(frozen=True)
class Weights:
    """Trained weights; `path` is the shortest name that `infer` takes for them."""

    kind: Kind
    path: Path
    file: Path
    """The file; a whole model's folder."""
    label: str
    step: int | None = None
    """The step of a checkpoint."""

    @property
    def settings(self) -> dict[str, Any]:
        """The inference settings in the weights; empty if another tool wrote them."""
        contract = _of_model(self.file) if self.kind == "model" else _in_header(self.file, _changed(self.file))
        return {key: contract[key] for key in _SHOWN if contract.get(key) is not None}


@dataclass(frozen=True)
class Source:
    """A run, or a single file, with its weights: the final ones first, and checkpoints from the oldest on."""

    place: Path
    name: str
    weights: tuple[Weights, ...]


def sources(workspace: Workspace) -> list[Source]:
    """Return what can be drawn with: runs, the last active first, then files."""
    runs = [run_source(run.folder) for run in list_runs(workspace.folders, everywhere=False)]
    files = {one.place: one for folder in workspace.folders for one in _files_below(folder)}
    return [source for source in (*runs, *files.values()) if source.weights and _is_inside(workspace, source)]


def _is_inside(workspace: Workspace, source: Source) -> bool:
    """Return whether no link leads out of the opened folders."""
    return all(workspace.holds(one.file) for one in source.weights)


def run_source(run: Path) -> Source:
    """Return a run with its weights; it has none before its first checkpoint."""
    best = list(_weights_in(run / "best", "best"))[:1]
    return Source(run, run.name, (*_weights_in(run, FINAL), *best, *_checkpoints(run)))


def _checkpoints(run: Path) -> Iterator[Weights]:
    steps = {int(found[1]): path for path in _entries(run / "checkpoints") if (found := _STEP.fullmatch(path.name))}
    for step in sorted(steps):
        yield from list(_weights_in(steps[step], f"step {step}", step))[:1]


def _weights_in(folder: Path, label: str, step: int | None = None) -> Iterator[Weights]:
    for kind, names, file in _KINDS:
        for name in names:
            if not _is_file(folder / name / file):
                continue
            is_first, whole = name == names[0], folder / name
            path = folder if is_first and kind != "model" else whole
            content = whole if kind == "model" else whole / file
            yield Weights(kind, path, content, label if is_first else f"{label}, without EMA", step)


def _files_below(root: Path) -> Iterator[Source]:
    """Yield adapters and embeddings that lie in an opened folder, or in a folder there."""
    inside = [path for path in _entries(root) if path.is_dir() and not path.is_symlink()]
    for folder in (root, *inside):
        for path in _entries(folder) if not is_run_folder(folder) else []:
            kind = _kind_of(path, _changed(path)) if path.suffix.lower() == ".safetensors" and _is_file(path) else None
            if kind is not None:
                yield Source(path, path.name, (Weights(kind, path, path, "file"),))


@functools.lru_cache(1024)
def _kind_of(file: Path, changed: int) -> Kind | None:
    """Return the kind of a safetensors file by its keys; None for a base model or anything else."""
    try:
        keys = read_header(file).tensors.keys()
    except (BadHeader, OSError):
        return None
    if {*keys} == {"clip_l", "clip_g"}:
        return "embedding"
    return "adapter" if any(locate(key) for key in keys) else None


@functools.lru_cache(1024)
def _in_header(file: Path, changed: int) -> Mapping[str, Any]:
    try:
        return parse_object(read_header(file).metadata.get(CONTRACT_KEY, "{}"))
    except (BadHeader, NotJson, OSError):
        return {}


def _of_model(folder: Path) -> Mapping[str, Any]:
    try:
        return read_object(folder / CONTRACT_FILE)
    except (NotJson, OSError):
        return {}


def _entries(folder: Path) -> list[Path]:
    """Return what lies in a folder, without hidden files; nothing if it cannot be read."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0

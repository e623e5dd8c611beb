"""Trained weights in the opened folders: of runs, with their checkpoints, and adapter files of other tools."""

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
from sd3tune.config.run_folder import read_run_file
from sd3tune.files.json import NotJson, parse_object, read_object
from sd3tune.files.tensor_header import BadHeader, read_header
from sd3tune.model.base.contract import CONTRACT_FILE
from sd3tune.publish.files import ADAPTERS, EMBEDDINGS, MODELS
from sd3tune.ui.workspace import Workspace

Kind = Literal["adapter", "embedding", "model"]

_DEPTH = 4
"""Folders below an opened one that are searched."""
_MOST_FOLDERS = 5000
_STEP = re.compile(r"step-(\d+)")
_INDEX = "model_index.json"
_OF_CLIP = {"clip_l", "clip_g"}
_CONTRACT_KEYS = ("base", "resolution", "sampling_steps", "guidance", "instance_prompt", "trigger")


@dataclass(frozen=True)
class Weights:
    """Trained weights, as `infer` takes their path."""

    kind: Kind
    path: Path
    file: Path
    """The file, or the model's folder."""
    label: str
    step: int | None = None

    @property
    def contract(self) -> dict[str, Any]:
        """The inference settings that the page shows; empty if another tool wrote the weights."""
        if self.kind == "model":
            found = _contract_of_model(self.file / CONTRACT_FILE)
        else:
            found = _contract_in(self.file, _changed(self.file))
        return {key: found[key] for key in _CONTRACT_KEYS if found.get(key) is not None}


@dataclass(frozen=True)
class Source:
    """A run, or a single file, with its weights: the final ones first, checkpoints from the oldest on."""

    folder: Path
    name: str
    is_run: bool
    weights: tuple[Weights, ...]

    @property
    def kind(self) -> Kind:
        return self.weights[0].kind


def sources(workspace: Workspace) -> list[Source]:
    """Return all sources with weights, the runs that changed last first."""
    found: dict[Path, Source] = {}
    for folder in workspace.folders:
        for place in _folders(folder):
            if read_run_file(place):
                found.setdefault(place, of_run(place))
            else:
                found |= {file: source for file, source in _files(place) if file not in found}
    held = [source for source in found.values() if source.weights]
    return sorted(held, key=lambda source: (not source.is_run, -_changed(source.folder)))


def of_run(run: Path) -> Source:
    """Return a run's weights; none before its first checkpoint."""
    final = list(_in_folder(run, "final"))
    best = [one for one in _in_folder(run / "best", "best") if one.file.parent.name in (*ADAPTERS[:1], *EMBEDDINGS[:1], "best")]
    return Source(run, run.name, True, (*final, *best, *_checkpoints(run)))


def _checkpoints(run: Path) -> Iterator[Weights]:
    numbered = [(int(match[1]), path) for path in _entries(run / "checkpoints") if (match := _STEP.fullmatch(path.name))]
    for step, path in sorted(numbered):
        yield from list(_in_folder(path, f"step {step}", step))[:1]


def _in_folder(folder: Path, label: str, step: int | None = None) -> Iterator[Weights]:
    """Yield the weights in a run, a checkpoint or `best`, those with EMA before the others."""
    for names, file, kind in _KINDS:
        for name in names:
            inside = folder / name / file
            if not _is_file(inside):
                continue
            whole = folder / name if kind == "model" or name != names[0] else folder
            found = folder / name if kind == "model" else inside
            yield Weights(kind, whole, found, label if name == names[0] else f"{label}, without EMA", step)


_KINDS: tuple[tuple[tuple[str, ...], str, Kind], ...] = (
    (ADAPTERS, ADAPTER_FILE, "adapter"),
    (EMBEDDINGS, EMBEDDING_FILE, "embedding"),
    (MODELS, _INDEX, "model"),
)


def _files(folder: Path) -> Iterator[tuple[Path, Source]]:
    """Yield the adapters and embeddings of other tools in a folder."""
    for path in _entries(folder):
        if path.suffix.lower() == ".safetensors" and _is_file(path):
            kind = _kind_of(path, _changed(path))
            if kind is not None:
                yield path, Source(path, path.stem, False, (Weights(kind, path, path, "the file"),))


@functools.lru_cache(1024)
def _kind_of(file: Path, changed: int) -> Kind | None:
    """Return the kind of a safetensors file by its keys; None for a model or anything else."""
    try:
        keys = read_header(file).tensors.keys()
    except (BadHeader, OSError):
        return None
    if set(keys) == _OF_CLIP:
        return "embedding"
    return "adapter" if any(locate(key) for key in keys) else None


@functools.lru_cache(1024)
def _contract_in(file: Path, changed: int) -> Mapping[str, Any]:
    try:
        return parse_object(read_header(file).metadata.get(CONTRACT_KEY, "{}"))
    except (BadHeader, NotJson, OSError):
        return {}


def _contract_of_model(file: Path) -> Mapping[str, Any]:
    try:
        return read_object(file)
    except (NotJson, OSError):
        return {}


def _folders(root: Path) -> Iterator[Path]:
    """Yield a folder and those in it, without hidden ones, links, and what is in runs beside other runs."""
    waiting, seen = [(root, 0)], 0
    while waiting and seen < _MOST_FOLDERS:
        folder, depth = waiting.pop(0)
        seen += 1
        yield folder
        if depth < _DEPTH and not (folder / "model_index.json").exists():
            inside = _entries(folder) if not read_run_file(folder) else []
            waiting += [(path, depth + 1) for path in inside if path.is_dir() and not path.is_symlink()]


def _entries(folder: Path) -> list[Path]:
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

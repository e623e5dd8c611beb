"""The files in a store's folder, and deleting those that are no longer needed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sd3tune.data.store import damaged_in, exclusive, read_index, shards_in, temporaries_in
from sd3tune.errors import RunError

Names = tuple[str, ...]
"""The sorted names of an entry's tensors, such as `("mean", "std")`, which identify its kind."""


@dataclass(frozen=True)
class StoreFile:
    """One file of a store; its entries can only be deleted together."""

    path: Path
    kind: Literal["shard", "temporary", "unreadable"]
    nbytes: int
    idle_days: float
    """Days since it was written or last read."""
    entries: Counter[Names] = field(default_factory=Counter)
    entry_bytes: Counter[Names] = field(default_factory=Counter)


def survey(root: Path) -> list[StoreFile]:
    """Return the store's files, without the manifest and foreign files."""
    found = [_shard(path) for path in shards_in(root)]
    damaged = [_file(path, "unreadable") for path in damaged_in(root)]
    return [*found, *damaged, *(_file(path, "temporary") for path in temporaries_in(root))]


def remove(root: Path, unwanted: Callable[[StoreFile], bool]) -> list[StoreFile]:
    """Delete and return the files for which `unwanted` is true. Raises RunError while a store is open here."""
    with exclusive(root):
        files = [file for file in survey(root) if unwanted(file)]
        try:
            for file in files:
                file.path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"{error.filename}: cannot be removed ({error.strerror})") from None
    return files


def _shard(path: Path) -> StoreFile:
    try:
        index = read_index(path)
    except (OSError, ValueError):
        return _file(path, "unreadable")
    file = _file(path, "shard")
    for entry in index.values():
        names = tuple(sorted(entry.names))
        file.entries[names] += 1
        file.entry_bytes[names] += entry.nbytes
    return file


def _file(path: Path, kind: Literal["shard", "temporary", "unreadable"]) -> StoreFile:
    try:
        status = path.stat()
    except FileNotFoundError:  # finished or cleaned up a moment ago
        return StoreFile(path, kind, 0, 0.0)
    return StoreFile(path, kind, status.st_size, max(0.0, time.time() - status.st_mtime) / 86400)

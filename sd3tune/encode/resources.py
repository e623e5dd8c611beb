"""Resources for encoding: disk space, freed memory, and the split of work between processes."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import torch

from sd3tune.encode.report import megabytes
from sd3tune.errors import RunError


def check_room(folder: Path, label: str, entries: int, nbytes: int) -> str:
    """Return a line about the entries to write. Raises RunError, with the numbers, if the disk lacks space."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise RunError(
            f"{folder}: encoding {label} needs {megabytes(nbytes)} and {megabytes(free)} are free; "
            "free some space or set data.cache_dir to another disk"
        )
    number = "1 entry" if entries == 1 else f"{entries} entries"
    return f"{label}: {number} to encode, {megabytes(nbytes)} in {folder} ({megabytes(free)} free)"


def release(device: torch.device | str) -> None:
    """Return the memory of unreferenced components to the system."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def is_mine(key: str, rank: int, world: int) -> bool:
    """Return True if this process encodes the entry.

    It depends only on the key: the set of missing entries may look different to another process a moment later.
    """
    return int(key[:16], 16) % world == rank

"""What encoding asks of the machine: room on the disk, memory given back, work for several processes."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import torch

from sd3tune.encode.report import megabytes
from sd3tune.errors import RunError


def check_room(folder: Path, what: str, entries: int, nbytes: int) -> str:
    """Return a line about the entries to write. Raises RunError, with the numbers, when the disk lacks the room."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if nbytes > free:
        raise RunError(
            f"{folder}: encoding {what} needs {megabytes(nbytes)} and {megabytes(free)} are free; "
            "free some space or set data.cache_dir to another disk"
        )
    number = "1 entry" if entries == 1 else f"{entries} entries"
    return f"{what}: {number} to encode, {megabytes(nbytes)} in {folder} ({megabytes(free)} free)"


def release(device: torch.device | str) -> None:
    """Return the memory of a component without references to the system."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def is_mine(key: str, rank: int, world: int) -> bool:
    """Return whether this process encodes the entry.

    It depends on the key only, not on the missing entries, which another process may see differently a moment later.
    """
    return int(key[:16], 16) % world == rank

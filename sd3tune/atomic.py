"""Files and folders that appear whole or not at all: written under a temporary name, synced, renamed.

What a killed writer leaves is called `.tmp-...`, and is never read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sd3tune.errors import RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or a file may hold no more."""
TEMPORARY = ".tmp-"
_ON_WINDOWS = os.name == "nt"
_STALE_SECONDS = 3600.0  # nothing takes that long to be written, so an older temporary file has lost its writer


class WriteError(RunError):
    """Something could not be written to `folder`; `__cause__` is the system's refusal."""

    def __init__(self, folder: Path, cause: OSError) -> None:
        self.folder = folder
        self.way_out = "free some space" if cause.errno in FULL else "choose another place"
        self.refusal = f"{folder}: cannot write here: {cause.strerror or cause}"
        super().__init__(f"{self.refusal}; {self.way_out}{' and run again' * (cause.errno in FULL)}")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on leaving, what was written there becomes `path`."""
    temporary = _beside(path)
    with _removed_on_failure(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on leaving, it becomes `path`, replacing what was there."""
    temporary = _beside(path)
    with _removed_on_failure(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            sync(written)
        if path.exists():
            discarded = _beside(path, "old")
            path.replace(discarded)
            temporary.replace(path)
            shutil.rmtree(discarded)
        else:
            temporary.replace(path)
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove_folder(path: Path) -> None:
    """So that it is never half there under its name."""
    discarded = _beside(path, "removed")
    path.replace(discarded)
    shutil.rmtree(discarded)


def remove_unfinished(folder: Path) -> None:
    """Remove all that killed writers left below `folder`, where nobody else may be writing.

    A folder that was about to be replaced gets its name back.
    """
    for path in sorted(folder.rglob(f"{TEMPORARY}*")):
        replaced = re.fullmatch(rf"{re.escape(TEMPORARY)}\d+-old-(.+)", path.name)
        if replaced and path.is_dir() and not path.with_name(replaced[1]).exists():
            path.replace(path.with_name(replaced[1]))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it went with its folder


def remove_stale(folder: Path) -> None:
    """Remove the files that killed writers left in `folder`, where others may be writing."""
    for path in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def sync(path: Path) -> None:
    """Flush a file's content or a folder's entries to the disk.

    Windows opens no folders, and flushes only files that are open for writing.
    """
    if _ON_WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if _ON_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def system_error(error: BaseException) -> OSError | None:
    """The system's refusal that `error` is, or that safetensors tells of in words; None for anything else."""
    if isinstance(error, SafetensorError):
        number = re.search(r"\(os error (\d+)\)", str(error))
        return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
    return error if isinstance(error, OSError) else None


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a WriteError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = system_error(error)
        if cause is None:
            raise
        raise WriteError(folder, cause) from cause


def _beside(path: Path, what: str = "") -> Path:
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{what}{'-' * bool(what)}{path.name}")


@contextmanager
def _removed_on_failure(temporary: Path) -> Iterator[None]:
    try:
        with writing_in(temporary.parent):
            yield
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise

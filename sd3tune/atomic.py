"""Files and folders that appear whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sd3tune.errors import RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or a file may hold no more."""


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on leaving, what was written there becomes `path`."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with _removed_on_failure(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on leaving, it becomes `path`, replacing what was there."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with _removed_on_failure(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            sync(written)
        if path.exists():
            discarded = path.with_name(f".tmp-{os.getpid()}-old-{path.name}")
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


def sync(path: Path) -> None:
    """Flush a file's content or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
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
def _removed_on_failure(temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        cause = system_error(error)
        if cause is None:
            raise
        way_out = "free some space and run again" if cause.errno in FULL else "choose another place"
        raise RunError(f"{temporary.parent}: cannot write here: {cause.strerror or cause}; {way_out}") from cause

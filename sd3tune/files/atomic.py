"""Atomic writes of files and folders: written under a temporary name, synced, then renamed.

A killed writer leaves a file or folder named `.tmp-...`, which is never read. Temporary names are random and created
exclusively, so that other users of a shared folder cannot place a link or file there first.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError

from sd3tune.errors import RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, quota or file."""
TEMPORARY = ".tmp-"
_TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-f]+-(?:old-(?P<replaced>.+)|.+)", re.DOTALL)
_ON_WINDOWS = os.name == "nt"
_KEPT: dict[Path, tuple[int, int]] = {}
"""Folder that must not be recreated -> its device and inode."""
_STALE_SECONDS = 3600.0  # no write takes that long, so the writer of an older temporary file is gone


class WriteError(RunError):
    """A failed write to `folder`; `__cause__` is the OSError."""

    def __init__(self, folder: Path, cause: OSError) -> None:
        self.folder = folder
        self.way_out = "free some space" if cause.errno in FULL else "choose another place"
        self.refusal = f"{folder}: cannot write here: {cause.strerror or cause}"
        super().__init__(f"{self.refusal}; {self.way_out}{' and run again' * (cause.errno in FULL)}")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a new, empty file in the folder of `path`; on leaving, it is renamed to `path`."""
    temporary, descriptor = _create_temporary(path)
    os.close(descriptor)
    with _removed_on_failure(temporary):
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `path`; on leaving, rename it to `path`, replacing an earlier one."""
    temporary = _temporary_name(path)
    with writing_in(path.parent):
        make_folder(path.parent)
        temporary.mkdir()
    with _removed_on_failure(temporary):
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            sync(written)
        _check_kept(path)
        if path.exists():
            discarded = _temporary_name(path, "old")
            path.replace(discarded)
            temporary.replace(path)
            if discarded.is_symlink():
                discarded.unlink()
            else:
                shutil.rmtree(discarded)
        else:
            temporary.replace(path)
        sync(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, but never recreate one that is `kept_in_place`. Raises OSError."""
    kept = _check_kept(folder)
    if kept is None:
        folder.mkdir(parents=True, exist_ok=True)
        return
    inside = folder.relative_to(kept)
    for between in [*reversed(inside.parents[:-1]), inside] if inside.parts else []:
        (kept / between).mkdir(exist_ok=True)


@contextmanager
def kept_in_place(folder: Path) -> Iterator[None]:
    """Refuse, inside the context, to write into another folder of this name if this one is moved or unmounted."""
    found = folder.stat()
    _KEPT[folder] = found.st_dev, found.st_ino
    try:
        yield
    finally:
        del _KEPT[folder]


def _check_kept(path: Path) -> Path | None:
    """Return the `kept_in_place` folder around `path`, if any; raise FileNotFoundError if it was moved or deleted."""
    kept = next((folder for folder in _KEPT if path.is_relative_to(folder)), None)
    if kept is not None:
        found = kept.stat()
        if (found.st_dev, found.st_ino) != _KEPT[kept]:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(kept))
    return kept


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file through the descriptor that created it, so that no link in a shared folder can redirect it."""
    temporary, descriptor = _create_temporary(path)
    with _removed_on_failure(temporary):
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove_folder(path: Path) -> None:
    """Remove a folder atomically: it is renamed first."""
    discarded = _temporary_name(path, "removed")
    path.replace(discarded)
    shutil.rmtree(discarded)


def remove_unfinished(folder: Path) -> None:
    """Remove the leftovers of killed writers below `folder`, where no other process may be writing.

    A folder that was about to be replaced gets its name back. Links are removed, never followed.
    """
    for path in sorted(path for path in folder.rglob(f"{TEMPORARY}*") if is_temporary(path.name)):
        found = _TEMPORARY_NAME.fullmatch(path.name)
        replaced = found and found["replaced"]
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)  # it may have been removed with its folder
        elif replaced and not path.with_name(replaced).exists():
            path.replace(path.with_name(replaced))
        else:
            shutil.rmtree(path)


def is_temporary(name: str) -> bool:
    """Return True for a writer's temporary name."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


def remove_files(root: Path, unwanted: Callable[[PurePath], bool]) -> None:
    """Remove the regular files below `root` whose relative path is `unwanted`, and folders that become empty.

    Links are neither removed nor followed. A folder that is `unwanted` is removed if it is empty.
    """
    emptied = set[Path]()
    for folder, _, names in os.walk(root, topdown=False):
        folder_path = Path(folder)
        for path in (folder_path / name for name in names):
            if unwanted(path.relative_to(root)) and stat.S_ISREG(path.lstat().st_mode):
                path.unlink()
                emptied.add(folder_path)
        if folder_path != root and (folder_path in emptied or unwanted(folder_path.relative_to(root))):
            with suppress(OSError):  # the folder is not empty
                folder_path.rmdir()
                emptied.add(folder_path.parent)


def remove_stale(folder: Path) -> None:
    """Remove old temporary files of killed writers in `folder`, where other processes may be writing."""
    for path in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > _STALE_SECONDS:
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
    """Return the OSError that `error` is, or that a message of safetensors describes; None for any other error."""
    if isinstance(error, SafetensorError):
        number = re.search(r"\(os error (\d+)\)", str(error))
        return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
    return error if isinstance(error, OSError) else None


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Turn an OSError while writing into a WriteError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = system_error(error)
        if cause is None:
            raise
        raise WriteError(folder, cause) from cause


def _temporary_name(path: Path, purpose: str = "") -> Path:
    """Return an unpredictable name in the folder of `path`."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}-{purpose}{'-' * bool(purpose)}{path.name}")


def _create_temporary(path: Path) -> tuple[Path, int]:
    """Create an empty file beside `path`, not through a link. Return its path and a descriptor open for writing."""
    temporary = _temporary_name(path)
    with writing_in(path.parent):
        make_folder(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        return temporary, os.open(temporary, flags, 0o666)


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

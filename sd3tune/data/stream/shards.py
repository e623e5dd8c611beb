"""The shards of a stream: tar files on this machine or behind a URL, which are copied to a file without a name."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sd3tune.config.sections.data import WebDatasetSource
from sd3tune.errors import DataError
from sd3tune.files.regular import complaint, open_regular

EXTRA = "pip install 'sd3tune[stream]'"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_PAUSES = (1, 4, 16)
"""Seconds to wait before each new try to read a URL."""
_COPIED = 2**20
_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs"}
"""Scheme of a URL -> package that fsspec needs for it."""


@dataclass(frozen=True)
class Shard:
    """A part of a source that is read as a whole."""

    source: int
    """Index of the source."""
    name: str
    """Its name in messages: a path, a URL, or the number of a dataset's shard."""
    identity: tuple[str, int]
    """File name and length in bytes (0 if unknown), by which a resumed run knows it."""
    open: Callable[[Path], BinaryIO]
    """Return it as an open tar file, given a folder for a copy. Raises DataError."""


def list_shards(number: int, source: WebDatasetSource) -> list[Shard]:
    """Return the shards of source `number`, in the order of their names. Raises DataError."""
    names = [name for pattern in expanded(source.path) for name in _found(pattern)]
    if not names:
        raise DataError(f"{source.path}: there is no tar file; check data.sources")
    if _is_url(names[0]):
        _fsspec(names[0])
    problems = [f"{name}: no such file; check data.sources" for name in names if not (_is_url(name) or _is_file(name))]
    if problems:
        raise DataError(*problems[:10])
    return [_shard(number, name) for name in names]


def expanded(pattern: str) -> list[str]:
    """Return the texts that a pattern with braces stands for: `{08..10}` and `{a,b}`, as shells do."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], expanded(pattern[found.end() :])
    limits = _RANGE.fullmatch(found[1])
    inside = found[1].split(",") if limits is None else [f"{number:0{len(limits[1])}d}" for number in _numbers(limits)]
    return [before + part + end for part in inside for end in after]


def _numbers(limits: re.Match[str]) -> range:
    first, last = int(limits[1]), int(limits[2])
    return range(first, last + 1) if first <= last else range(first, last - 1, -1)


def _is_url(name: str) -> bool:
    return "://" in name


def _is_file(name: str) -> bool:
    return os.path.isfile(name)


def _found(pattern: str) -> list[str]:
    """Return the shards of a pattern without braces."""
    if _is_url(pattern):
        return _on_server(pattern) if glob.has_magic(pattern.split("?")[0]) else [pattern]
    if os.path.isdir(pattern):
        return sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]


def _on_server(pattern: str) -> list[str]:
    scheme = pattern.split("://")[0]
    with _explained(pattern):
        files, path = _fsspec(pattern).url_to_fs(pattern)
        return [name if _is_url(name) else f"{scheme}://{name}" for name in sorted(files.glob(path))]


def _shard(number: int, name: str) -> Shard:
    base = os.path.basename(name.split("?")[0])
    if _is_url(name):
        return Shard(number, name, (base, 0), lambda folder: copied(folder, lambda file: _download(name, file)))
    return Shard(number, name, (base, os.path.getsize(name)), lambda folder: _opened(name))


def _opened(name: str) -> BinaryIO:
    try:
        return open_regular(name, largest=None)
    except OSError as error:
        raise DataError(f"{name}: {complaint(error)}") from None


def copied(folder: Path, write: Callable[[BinaryIO], None]) -> BinaryIO:
    """Return a new file in the folder, filled by `write`. It has no name: its space is free once it is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed with its last sample)
        write(file)
        file.flush()
    except OSError as error:
        raise DataError(
            f"{folder}: a shard cannot be kept here ({error.strerror or error}); set data.cache_dir"
        ) from None
    return file


def _download(url: str, file: BinaryIO) -> None:
    for pause in (*_PAUSES, None):
        file.seek(0)
        file.truncate()
        try:
            with _explained(url):
                remote: BinaryIO = _fsspec(url).open(url, "rb").open()
            with remote:
                while part := _read(url, remote):
                    file.write(part)
            return
        except DataError as error:
            if pause is None or isinstance(error.__cause__, FileNotFoundError):
                raise
            time.sleep(pause)


def _read(url: str, remote: BinaryIO) -> bytes:
    with _explained(url):
        return remote.read(_COPIED)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Raise DataError, naming the URL, in place of any error: each library has its own."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{url}: cannot be read ({reason}); check data.sources and the network") from error


def _fsspec(url: str) -> Any:
    """Return the library. Raises DataError if it, or what it needs for the URL, is missing."""
    for package in ("fsspec", _PACKAGES.get(url.split("://")[0], "fsspec")):
        if importlib.util.find_spec(package) is None:
            raise DataError(f"{url}: needs {package}: {EXTRA}")
    import fsspec

    return fsspec

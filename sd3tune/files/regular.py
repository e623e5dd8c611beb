"""Reader of foreign files: only regular files of a size that fits into memory.

A named pipe in a folder of photos would block, and a device such as `/dev/zero` never ends. Links to regular files are
followed.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

LARGEST = 2**30
"""Size limit in bytes of a file to read: the uncompressed size of the largest image that Pillow decodes."""

MAX_NAME_BYTES = 255
"""Longest file name of the common file systems, in bytes."""

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


class Refused(OSError):
    """A path that is not a regular file, or a file that is too large; `strerror` is the reason."""

    def __init__(self, why: str) -> None:
        super().__init__(None, why)


def open_regular(path: str | os.PathLike[str], largest: int | None = LARGEST) -> BinaryIO:
    """Open a file for reading. Raises Refused, or the OSError of a file that is missing or may not be read.

    A file of size 0 is not opened, as files in `/proc` have that size, and some of them block.
    """
    try:
        found = os.stat(path)
    except ValueError:  # the name contains a NUL
        raise Refused("is no name that a file can have") from None
    if not stat.S_ISREG(found.st_mode):
        raise Refused(f"is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}, not a file")
    if largest is not None and found.st_size > largest:
        raise Refused(f"has {found.st_size:,} bytes, and at most {largest:,} are read")
    return open(path, "rb") if found.st_size else io.BytesIO()


def read_regular(path: str | os.PathLike[str], largest: int = LARGEST) -> bytes:
    """Return the bytes of a file; see `open_regular`."""
    with open_regular(path, largest) as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        return file.read(min(length, largest))  # Python allocates as many bytes as it is asked for


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file of any size, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path, largest=None) as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def complaint(error: OSError) -> str:
    """Return the reason and the remedy for a file that cannot be read, to follow its name."""
    if isinstance(error, Refused):
        return f"{error.strerror}; replace or remove it"
    permissions = "; check its permissions" if isinstance(error, PermissionError) else ""
    return f"cannot be read ({error.strerror or error}){permissions}"

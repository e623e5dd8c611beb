"""An image of a dataset: one cell, read on demand."""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3tune.errors import DataError
from sd3tune.files.regular import LARGEST, Refused, open_regular, read_regular

_ARCHIVED = re.compile(r"zip://(?P<member>.+)::(?:file://)?(?P<archive>/[^:]+)")  # `zip://a.png::/home/me/photos.zip`


@dataclass(frozen=True)
class Row:
    """The image of one row. The dataset is memory-mapped, and the row is read on demand."""

    dataset: Any = field(repr=False, compare=False)
    """The dataset, reduced to its image column."""
    column: str
    place: str
    """The dataset's name in messages."""
    index: int
    folders: tuple[Path, ...] = field(default=(), repr=False, compare=False)
    """Folders that may contain images stored outside the dataset."""
    loaded: bool = field(default=False, repr=False, compare=False)
    """True if `datasets` itself listed the files, so that paths are absolute; else a path is data of the dataset."""

    @property
    def name(self) -> str:
        return f"{os.path.basename(self.place)}[{self.index}]"

    def __str__(self) -> str:
        return f"{self.place}[{self.index}]"

    @property
    def file_name(self) -> str | None:
        """The image's original file name, if the dataset has it."""
        cell = self.dataset[self.index][self.column]
        path: str | None = None if cell is None else cell["path"]
        archived = _ARCHIVED.fullmatch(path or "")
        return archived["member"] if archived else path

    def read_bytes(self) -> bytes:
        """Return the stored bytes, or the bytes of a file in the dataset's own folder, following links.

        Raises DataError if there are none or the file lies elsewhere, and OSError if it cannot be read.
        """
        cell = self.dataset[self.index][self.column] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if cell.get("path") is None:
            raise DataError(f"{self}: column {self.column!r} is empty; remove the row")
        archived = _ARCHIVED.fullmatch(cell["path"])
        file = self._inside(archived["archive"] if archived else cell["path"])
        return _member(file, archived["member"]) if archived else read_regular(file)

    def _inside(self, path: str) -> Path:
        """Return the file at a dataset's path. Raises DataError unless it lies in one of `folders`."""
        for folder in self.folders if self.loaded or not os.path.isabs(path) else ():
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # a NUL, or a loop of links
                file = (folder / path).resolve()
                if file.is_relative_to(folder.resolve()):
                    return file
        raise DataError(
            f"{self}: column {self.column!r} names the file {path}, which is no path below the dataset's folder; "
            "put the picture itself into the dataset, or its file into that folder"
        )


def _member(archive: Path, name: str) -> bytes:
    """Return the bytes of a file in a ZIP archive. Raises OSError."""
    with open_regular(archive, largest=None) as file:
        try:
            with zipfile.ZipFile(file) as opened:
                if opened.getinfo(name).file_size > LARGEST:
                    raise Refused(f"has {opened.getinfo(name).file_size:,} bytes, and at most {LARGEST:,} are read")
                return opened.read(name)
        except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, zlib.error) as error:
            raise OSError(None, f"{archive.name}: {error}") from None

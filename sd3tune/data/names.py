"""File names that differ in case or Unicode form."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath


class Names:
    """Lookup of files whose names differ from the given one in case or Unicode form. Lists each folder once.

    On Windows and macOS `a.TXT` and `a.txt` are the same file, and macOS may write `é` as two characters (NFD).
    """

    def __init__(self) -> None:
        self._listed: dict[Path, Mapping[str, Sequence[str]]] = {}

    def like(self, path: Path) -> list[Path]:
        """Return the folder entries that `path` may mean; see `in_folder`."""
        return self.in_folder(path.parent, path.name)

    def in_folder(self, folder: Path, name: str) -> list[Path]:
        """Return the entries of a folder that `name` may mean: the exact name first, then by name."""
        found = self.listed(folder).get(folded(name))
        if found is None:  # almost always
            return []
        return [folder / entry for entry in sorted(found, key=lambda entry: entry != name)]

    def listed(self, folder: Path) -> Mapping[str, Sequence[str]]:
        """Return the entries of a folder by their `folded` names."""
        if folder not in self._listed:
            listed: dict[str, tuple[str, ...]] = {}
            with contextlib.suppress(OSError, ValueError):
                for entry in sorted(os.listdir(folder)):
                    name = entry if (name := folded(entry)) == entry else name  # most are, and then share memory
                    listed[name] = (*listed.get(name, ()), entry)
            self._listed[folder] = listed
        return self._listed[folder]

    def find(self, folder: Path, relative: PurePosixPath) -> Path | None:
        """Return the entry below `folder` that a relative path means, or None."""
        path = folder
        for part in relative.parts:
            found = self.like(path / part)
            if not found:
                return None
            path = found[0]
        return path


def suffix_of(name: str) -> str:
    """Return the extension of a file name as `PurePath.suffix` does, in lower case; it is several times faster."""
    dot = name.rfind(".")
    return name[dot:].lower() if 0 < dot < len(name) - 1 else ""


def folded(name: str) -> str:
    """Return the form of a name in which case and Unicode normalisation make no difference."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())

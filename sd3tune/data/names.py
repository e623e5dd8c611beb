"""File names that differ in case or Unicode form."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from pathlib import Path, PurePosixPath


class Names:
    """Lookup of files whose names differ from the given one in case or Unicode form. Lists each folder once.

    On Windows and macOS `a.TXT` and `a.txt` are the same file, and macOS may write `é` as two characters (NFD).
    """

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def like(self, path: Path) -> list[Path]:
        """Return the folder entries that `path` may mean: the exact name first, then by name."""
        folder = path.parent
        if folder not in self._listed:
            listed = self._listed[folder] = {}
            with contextlib.suppress(OSError, ValueError):
                for name in sorted(os.listdir(folder)):
                    listed.setdefault(_folded(name), []).append(name)
        found = self._listed[folder].get(_folded(path.name), [])
        return [folder / name for name in sorted(found, key=lambda name: name != path.name)]

    def find(self, folder: Path, relative: PurePosixPath) -> Path | None:
        """Return the entry below `folder` that a relative path means, or None."""
        path = folder
        for part in relative.parts:
            found = self.like(path / part)
            if not found:
                return None
            path = found[0]
        return path


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())

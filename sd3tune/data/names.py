"""Names of files as people and other systems write them."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from pathlib import Path, PurePosixPath


class Names:
    """Finds files whose names differ from the given name in case or Unicode form; lists each folder once.

    On Windows and macOS `a.TXT` and `a.txt` are the same file, and macOS may write `é` as two characters (NFD).
    """

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def like(self, path: Path) -> list[Path]:
        """The entries of its folder that `path` may mean: the one of just this name first, then by name."""
        folder = path.parent
        if folder not in self._listed:
            listed = self._listed[folder] = {}
            with contextlib.suppress(OSError, ValueError):
                for name in sorted(os.listdir(folder)):
                    listed.setdefault(_folded(name), []).append(name)
        found = self._listed[folder].get(_folded(path.name), [])
        return [folder / name for name in sorted(found, key=lambda name: name != path.name)]

    def find(self, folder: Path, relative: PurePosixPath) -> Path | None:
        """The entry below `folder` that a path of several parts means, or None."""
        path = folder
        for part in relative.parts:
            found = self.like(path / part)
            if not found:
                return None
            path = found[0]
        return path


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())

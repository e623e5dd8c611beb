"""The folders that the page was opened on; it reads and writes nothing outside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd3tune.errors import ConfigError, UserError

JOBS = Path("runs", ".ui")
"""Folder of the jobs, in the first opened folder."""
_LONGEST_NAME = 120


class Outside(UserError):
    """A path outside the opened folders."""


@dataclass(frozen=True)
class Workspace:
    """The opened folders, as real paths. In the first one commands run, and configurations and runs are written."""

    folders: tuple[Path, ...]

    @classmethod
    def opened_on(cls, folders: Sequence[Path]) -> Workspace:
        """Return the workspace of existing folders. Raises ConfigError."""
        for folder in folders:
            if not folder.expanduser().is_dir():
                raise ConfigError(f"{folder}: no such folder; name the folder of your photos and runs")
        return cls(tuple(dict.fromkeys(folder.expanduser().resolve() for folder in folders)))

    @property
    def root(self) -> Path:
        """The first opened folder."""
        return self.folders[0]

    @property
    def jobs(self) -> Path:
        return self.root / JOBS

    def holds(self, path: Path) -> bool:
        """Return whether a path, with its links followed, is in an opened folder."""
        try:
            real = path.resolve()
        except (OSError, RuntimeError, ValueError):  # a circle of links, a name that no file can have
            return False
        return any(real.is_relative_to(folder) for folder in self.folders)

    def path(self, text: str) -> Path:
        """Return the real path of a text from the page, relative to the root. Raises Outside."""
        path = self.root / text
        if "\0" in text or not self.holds(path):
            places = ", ".join(map(str, self.folders))
            raise Outside(f"{text}: outside {places}; open the page on that folder, too: sd3tune ui {self.root} FOLDER")
        return path.resolve()

    def shown(self, path: Path) -> str:
        """Return a path as the page shows it: relative to the root if it is inside, else in full."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


def plain_name(name: str) -> str:
    """Return a file name from the page. Raises Outside for one with folders, hidden, too long or unprintable."""
    if not name or len(name) > _LONGEST_NAME or name.startswith(".") or not name.isprintable() or {*"/\\:"} & {*name}:
        raise Outside(f"{name[:80]!r}: cannot name a file here; use letters, digits, spaces, `.`, `_` and `-`")
    return name

"""The protocol of experiment trackers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

from sd3tune.files.atomic import remove_files


@dataclass(frozen=True)
class Start:
    """An attempt at a run: the first one, or one that resumes."""

    name: str
    folder: Path
    """The run's `logs/`, with the files of earlier attempts."""
    config: Mapping[str, Any]
    """The whole configuration, without local paths."""
    files: re.Pattern[str] = re.compile("(?!)")
    """The tracker's own files (see `TrackerKind.files`); none until `Trackers` states them."""

    def remove_earlier(self, name: str) -> None:
        """Delete the tracker's files of earlier attempts in the folder `name` of `logs/`."""

        def is_earlier(path: PurePath) -> bool:
            inside = path.parts[1:]
            own = self.files.fullmatch(PurePath(*inside).as_posix())
            return path.parts[0] == self.folder.name and inside[:1] == (name,) and own is not None

        remove_files(self.folder.parent, is_earlier)


class Tracker(Protocol):
    """An experiment tracker. Each attempt reports all steps since 0 again, ascending. Methods may raise any error."""

    where: str
    """The command or address that shows the curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path, caption: str) -> None: ...

    def close(self, finished: bool) -> None:
        """Close the tracker; `finished` is False for a stopped or failed run."""

"""The protocol of experiment trackers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

from sd3tune.files.atomic import remove_files

_LOGS = re.compile(
    r"tensorboard/events\.out\.tfevents\.\d+|wandb_id|wandb/(offline-)?run-\d{8}_\d{6}-\w+(/.+)?|wandb/debug[\w-]*\.log",
    re.DOTALL,
)
"""Paths, relative to the run's `logs/`, of the files that trackers write."""


def is_log(path: PurePath) -> bool:
    """Return whether a path, relative to `logs/`, is a tracker's file."""
    return _LOGS.fullmatch(path.as_posix()) is not None


@dataclass(frozen=True)
class Start:
    """An attempt at a run: the first one, or one that resumes."""

    name: str
    folder: Path
    """The run's `logs/`, with the files of earlier attempts."""
    config: Mapping[str, Any]
    """The whole configuration, without local paths."""

    def remove_earlier(self, tracker: str) -> None:
        """Delete earlier attempts' files of a tracker."""

        def is_earlier(path: PurePath) -> bool:
            inside = path.parts[1:]
            return path.parts[0] == self.folder.name and inside[:1] == (tracker,) and is_log(PurePath(*inside))

        remove_files(self.folder.parent, is_earlier)


class Tracker(Protocol):
    """An experiment tracker. Each attempt reports all steps since 0 again, ascending. Methods may raise any error."""

    where: str
    """The command or address that shows the curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path, caption: str) -> None: ...

    def close(self, finished: bool) -> None:
        """Close the tracker; `finished` is False for a stopped or failed run."""

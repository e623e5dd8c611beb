"""The protocol of a tracker, and its start."""

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
"""Files that trackers write, by their path in the run's `logs/`."""


def is_log(path: PurePath) -> bool:
    """Whether a tracker gives this name to one of its files; `path` is that in `logs/`."""
    return _LOGS.fullmatch(path.as_posix()) is not None


@dataclass(frozen=True)
class Start:
    """An attempt at a run: the first one, or one that resumes."""

    name: str
    folder: Path
    """The run's `logs/`, with the files of earlier attempts."""
    config: Mapping[str, Any]
    """The whole configuration, without this machine's paths."""

    def remove_earlier(self, tracker: str) -> None:
        """Delete an earlier attempt's files in the folder of a tracker."""

        def wanted(path: PurePath) -> bool:
            inside = path.parts[1:]
            return path.parts[0] == self.folder.name and inside[:1] == (tracker,) and is_log(PurePath(*inside))

        remove_files(self.folder.parent, wanted)


class Tracker(Protocol):
    """Told everything since step 0 anew in each attempt, steps ascending; may raise whatever it likes."""

    where: str
    """The command or address that shows the curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path, caption: str) -> None: ...

    def close(self, finished: bool) -> None:
        """`finished` is false when the run was stopped or failed."""

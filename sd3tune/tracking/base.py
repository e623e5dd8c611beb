"""What a tracker is, and what it is told at the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Start:
    """An attempt at a run: the first one, or one that resumes."""

    name: str
    folder: Path
    """The run's `logs/`. A resumed run finds there what an earlier attempt left."""
    config: Mapping[str, Any]
    """The whole configuration, without this machine's paths."""


class Tracker(Protocol):
    """Told everything since step 0 anew in each attempt, steps ascending; may raise whatever it likes."""

    where: str
    """The command or address that shows the curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path, caption: str) -> None: ...

    def close(self, finished: bool) -> None:
        """`finished` is false when the run was stopped or failed."""

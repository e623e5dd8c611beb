"""The base class of the package's own callbacks, and all that they are made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sd3tune.run.encoding import Encoded
from sd3tune.run.preflight import Plan
from sd3tune.runtime.processes import Processes
from sd3tune.tracking.trackers import Trackers
from sd3tune.training.loop import View


@dataclass(frozen=True)
class Setup:
    """An attempt at a run before its first step."""

    plan: Plan
    encoded: Encoded
    processes: Processes
    contract: Mapping[str, Any]
    trackers: Trackers
    from_step: int
    """Number of steps that the checkpoint has; 0 for a fresh start."""


class RunCallback(ABC):
    """A callback (see `training.loop.Callback`) that the configuration turns on; it must not affect the weights."""

    timing: ClassVar[str | None] = None
    """Key of `seconds` in the timings of `run.json`, which has it for each run; None to count it as training time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Seconds spent in the callback."""
        self.warnings: list[str] = []
        """Warnings for `run.json`."""

    @classmethod
    @abstractmethod
    def make(cls, setup: Setup) -> RunCallback | None:
        """Return the callback for this rank; None if the configuration does not ask for it."""

    @abstractmethod
    def __call__(self, view: View) -> None: ...

    @property
    def ended(self) -> bool:
        """True if the run should end with the present step; equal on every rank."""
        return False

    def report(self) -> dict[str, Any]:
        """Return entries for the report in `run.json` and the card."""
        return {}

    def summary(self) -> list[str]:
        """Return lines for the end of a run."""
        return []

    def close(self, finished: bool) -> None:  # noqa: B027  most have nothing to close
        """Release resources; `finished` is False after a stopped or failed run."""

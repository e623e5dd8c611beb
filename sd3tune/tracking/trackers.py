"""All trackers of a run, combined; they report in the order of the steps."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

from sd3tune.config.sections.outputs import TrackingConfig, WandbConfig
from sd3tune.tracking.base import Start, Tracker

Warn = Callable[[str], None]


def _tensorboard(settings: bool, start: Start, warn: Warn) -> Tracker:
    from sd3tune.tracking.tensorboard import TensorBoard

    return TensorBoard(start)


def _wandb(settings: WandbConfig, start: Start, warn: Warn) -> Tracker:
    from sd3tune.tracking.wandb import Wandb

    return Wandb(settings, start, warn)


@dataclass(frozen=True)
class TrackerKind:
    """A tracker that a configuration can name; it is declared here, as its module needs its package."""

    make: Callable[[Any, Start, Warn], Tracker]
    """(settings, start, function that warns) -> the tracker."""
    files: re.Pattern[str]
    """Paths, relative to the run's `logs/`, of the files that it writes. Only these are ever deleted."""


TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": TrackerKind(_tensorboard, re.compile(r"tensorboard/events\.out\.tfevents\.\d+")),
    "wandb": TrackerKind(
        _wandb,
        re.compile(r"wandb_id|wandb/(offline-)?run-\d{8}_\d{6}-\w+(/.+)?|wandb/debug[\w-]*\.log", re.DOTALL),
    ),
}
"""Trackers by key of `tracking`, which is also the name of the required extra and package."""


def is_log(path: PurePath) -> bool:
    """Return whether a path, relative to `logs/`, is a tracker's file."""
    return any(kind.files.fullmatch(path.as_posix()) for kind in TRACKERS.values())


def missing_packages(config: TrackingConfig) -> list[str]:
    """Return a problem for each configured tracker that is not installed."""
    return [
        f"tracking.{name}: {name} is not installed: pip install 'sd3tune[{name}]'"
        for name in TRACKERS
        if getattr(config, name) and not _is_installed(name)
    ]


def _is_installed(name: str) -> bool:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return False
    return found is not None and found.origin is not None  # a folder ./wandb is not a package


class Trackers:
    """All trackers of a run. A tracker's first error is a warning, and the run continues without it.

    Metrics arrive late, in windows of steps. Pictures and held-out losses of a step wait for its metrics, to keep the
    order. A resumed attempt reports everything since step 0 again, so the curves always equal `metrics.jsonl`.
    """

    def __init__(self, config: TrackingConfig, start: Start, say: Callable[[str], object]) -> None:
        self.seconds = 0.0
        """Seconds spent in trackers."""
        self.warnings: list[str] = []
        self._say = say
        self._trackers: dict[str, Tracker] = {}
        self._step = 0
        self._waiting: dict[int, list[Callable[[Tracker], None]]] = {}
        for name, kind in TRACKERS.items():
            if settings := getattr(config, name):
                with self._isolated(name):
                    self._trackers[name] = kind.make(settings, replace(start, files=kind.files), self._warn)

    def line(self, line: Mapping[str, Any]) -> None:
        """Report a line of the metrics; call it once per step, in order."""
        self._step = int(line["step"])
        values = scalars({name: value for name, value in line.items() if name != "step"})
        earlier = [step for step in sorted(self._waiting) if step < self._step]
        for step in earlier:
            self._send(self._waiting.pop(step))
        self._send([lambda tracker: tracker.log(self._step, values), *self._waiting.pop(self._step, [])])

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Report other numbers of a step; `{"a": {"b": 1.0}}` is the curve `a/b`."""
        found = scalars(values)
        self._in_order(step, lambda tracker: tracker.log(step, found))

    def image(self, step: int, name: str, path: Path, caption: str) -> None:
        """Report a picture file; `name` is the same at every step."""
        self._in_order(step, lambda tracker: tracker.image(step, name, path, caption))

    def where(self) -> list[str]:
        """Return the command or address of each working tracker's curves."""
        return [tracker.where for tracker in self._trackers.values()]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._send([lambda tracker: tracker.close(finished=kind is None)])

    def _in_order(self, step: int, send: Callable[[Tracker], None]) -> None:
        if step <= self._step:
            self._send([send])
        else:
            self._waiting.setdefault(step, []).append(send)

    def _send(self, calls: list[Callable[[Tracker], None]]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._isolated(name):
                for send in calls:
                    send(tracker)

    @contextlib.contextmanager
    def _isolated(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except Exception as error:  # trackers may raise anything
            self._trackers.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(f"tracking.{name}: {reason}; the run continues without it")
        self.seconds += time.monotonic() - started

    def _warn(self, line: str) -> None:
        self.warnings.append(line)
        self._say(f"warning: {line}")


def scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers in nested `values`, with names joined by `/`; other values are left out."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[prefix + name] = float(value)
    return found

"""How often a door was tried and how that ended, kept in a file for whoever waits."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

OUTCOMES = ("accepted", "refused", "faults")
_FILE = os.environ.get("SD3TUNE_FUZZ_PROGRESS")
"""Where to write; nowhere if it is not set."""
_EVERY = 1.0
"""Seconds between two lines."""


class Progress:
    """The counts of one door: `accepted`, `refused`, and `faults`, which shrinking repeats."""

    def __init__(self, door: str) -> None:
        self.door = door
        self.seed: int | None = None
        """Of the round; None while the examples are those of every run."""
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self._outcome = "faults"
        self._written = 0.0

    @contextlib.contextmanager
    def counting(self) -> Iterator[Progress]:
        """Count one call, a fault unless it is said to be something else."""
        if time.monotonic() - self._written > _EVERY:
            self.write()
        self._outcome = "faults"
        try:
            yield self
        finally:
            self.counts[self._outcome] += 1

    def is_accepted(self) -> None:
        self._outcome = "accepted"

    def is_refused(self) -> None:
        self._outcome = "refused"

    def write(self) -> None:
        """Write door, seed and counts; a reader finds all of it or what was there before."""
        self._written = time.monotonic()
        if _FILE is not None:
            temporary = Path(f"{_FILE}.new")
            temporary.write_text(json.dumps({"door": self.door, "seed": self.seed, **self.counts}))
            temporary.replace(_FILE)

    def __str__(self) -> str:
        accepted, refused, faults = (self.counts[outcome] for outcome in OUTCOMES)
        return f"{self.door}: {accepted} accepted, {refused} refused, {faults} faults"

"""Let two processes train step by step in turns: seconds apart, they share the machine with the same other load."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

VARIABLE = "SD3TUNE_BENCH_TURNS"


@dataclass
class Turns:
    """A token in a pipe, a byte that permits to compute. After some steps a process passes it on, and waits for it."""

    mine: int
    """Pipe end from which the token is read."""
    theirs: int
    leads: bool
    """True if this side continues first after the first step, which both take at any time."""
    steps: int
    """Number of steps of a turn."""
    done: int = 0

    @classmethod
    def from_environment(cls) -> Turns | None:
        """Return the turns of the environment variable, `read,write,leads,steps`; None without it."""
        value = os.environ.get(VARIABLE)
        if value is None:
            return None
        mine, theirs, leads, steps = map(int, value.split(","))
        return cls(mine, theirs, bool(leads), steps)

    def pass_on(self) -> None:
        """Pass the token on after a step. Does not wait if the other side has ended."""
        turn, within = divmod(self.done, self.steps)
        self.done += 1
        if within:
            return
        if turn or not self.leads:
            self._give()
        os.read(self.mine, 1)  # returns nothing if the pipe is closed

    def _give(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self.theirs, b".")

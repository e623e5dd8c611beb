"""Two processes that train step by step in turns: seconds apart, they meet the same neighbours on the machine."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

VARIABLE = "SD3TUNE_BENCH_TURNS"


@dataclass
class Turns:
    """The right to compute is a byte in a pipe. After a few steps a process passes it on, and waits for its return."""

    mine: int
    """Where the right comes from."""
    theirs: int
    leads: bool
    """Whether this side goes on first after the first step, which both do at any time."""
    steps: int
    """Of a turn."""
    done: int = 0

    @classmethod
    def from_environment(cls) -> Turns | None:
        """As the variable says, `read,write,leads,steps`; None without it."""
        given = os.environ.get(VARIABLE)
        if given is None:
            return None
        mine, theirs, leads, steps = map(int, given.split(","))
        return cls(mine, theirs, bool(leads), steps)

    def pass_on(self) -> None:
        """Called after a step. Where the other side has ended, nothing is waited for."""
        turn, within = divmod(self.done, self.steps)
        self.done += 1
        if within:
            return
        if turn or not self.leads:
            self._give()
        os.read(self.mine, 1)  # nothing when the pipe is closed

    def _give(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self.theirs, b".")

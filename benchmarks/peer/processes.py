"""The commands of both sides as processes: alone, or two at a time that step in turns."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer.cells import CORES
from benchmarks.peer.turns import VARIABLE

ROOT = Path(__file__).parents[2]


class RunFailed(Exception):
    """A side's command failed, or did not do what was asked for."""


@dataclass(frozen=True)
class Stamps:
    """What one run of one side left behind; see `stamped`."""

    started: float
    ended: float
    cpu: float
    """Seconds of all threads, from the start to the end."""
    steps: list[tuple[list[float], list[float]]]
    peak_bytes: int
    imports: list[float]
    """Seconds, and CPU seconds, that went into imports until the end of the first step."""

    @property
    def first_step(self) -> tuple[float, float]:
        """Time from the start of the process to the end of the first step, and CPU time."""
        ended, cpu = self.steps[0][0]
        return ended - self.started, cpu

    @property
    def start(self) -> tuple[float, float]:
        """The same without the imports."""
        (took, cpu), (importing, importing_cpu) = self.first_step, self.imports
        return took - importing, cpu - importing_cpu

    def durations(self, warmup: int, clock: int) -> list[float]:
        """Of the steps after the first `warmup`, without the waiting between them; clock 0 is time, 1 is CPU time."""
        counted = self.steps[warmup - 1 :]
        return [after[0][clock] - before[1][clock] for before, after in itertools.pairwise(counted)]


class Side:
    """One process that runs `ours` or `peer`, its output in a log."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path, turns: Sequence[int] = ()) -> None:
        """`turns`, if any: the ends of pipes to read and to write, whether this side leads, and the steps of a turn."""
        self.name, self.stamps, self.log = name, folder / f"{name}.json", folder / f"{name}.log"
        self.stamps.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.peer.stamped", str(self.stamps), name, *arguments]
        with self.log.open("w") as output:
            self.started = time.monotonic()
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment(), **({VARIABLE: ",".join(map(str, turns))} if turns else {})},
                stdout=output,
                stderr=output,
                pass_fds=turns[:2],
            )

    def wait(self, steps: int) -> Stamps:
        """Until it has ended. Raises RunFailed, with the end of the log, unless it made that many steps."""
        _, status, used = os.wait4(self.process.pid, 0)
        ended = time.monotonic()
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        if code:
            raise RunFailed(f"{self.name} ended with exit code {code}:\n{_tail(self.log)}")
        seen: dict[str, Any] = json.loads(self.stamps.read_text(encoding="utf-8"))
        if len(seen["steps"]) != steps:
            raise RunFailed(f"{self.name}: {len(seen['steps'])} optimizer steps instead of {steps}")
        return Stamps(self.started, ended, used.ru_utime + used.ru_stime, **seen)


def run_alone(name: str, arguments: Sequence[str], folder: Path, steps: int) -> Stamps:
    """One run, from the start of its process to its end. Raises RunFailed."""
    return Side(name, arguments, folder).wait(steps)


def run_in_turns(arguments: Mapping[str, Sequence[str]], folder: Path, steps: int, turn: int) -> dict[str, Stamps]:
    """Return both sides at once, one of them computing at a time, `turn` steps long; the first of them leads.

    Raises RunFailed.
    """
    to_first, to_second = os.pipe(), os.pipe()
    ends = [(to_first[0], to_second[1], 1, turn), (to_second[0], to_first[1], 0, turn)]
    sides = []
    with contextlib.ExitStack() as stack:
        for pipe in (*to_first, *to_second):
            stack.callback(os.close, pipe)  # ours: the side that is left behind has to see the end of the other one
        for (name, of), turns in zip(arguments.items(), ends, strict=True):
            sides.append(Side(name, of, folder, turns))
    try:
        return {side.name: side.wait(steps) for side in sides}
    finally:
        for side in sides:
            if side.process.returncode is None:
                side.process.kill()
                side.process.wait()


def environment() -> dict[str, str]:
    """As many threads for both; none of them spins while it waits, and nobody asks the Hub."""
    threads = os.environ.get("OMP_NUM_THREADS", str(CORES))
    same = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **same}


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

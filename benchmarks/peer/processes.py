"""The commands of both sides as processes: alone, or both at once, stepping in turns."""

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
    """A side's command failed, or did not make the requested steps."""


@dataclass(frozen=True)
class Stamps:
    """The measurements of one run of one side; see `stamped`."""

    started: float
    ended: float
    cpu: float
    """CPU seconds of all threads, from start to end."""
    steps: list[tuple[list[float], list[float]]]
    peak_bytes: int
    imports: list[float]
    """Seconds and CPU seconds of imports until the end of the first step."""

    @property
    def first_step(self) -> tuple[float, float]:
        """Time and CPU time from the start of the process to the end of the first step."""
        ended, cpu = self.steps[0][0]
        return ended - self.started, cpu

    @property
    def start(self) -> tuple[float, float]:
        """`first_step` without imports."""
        (took, cpu), (importing, importing_cpu) = self.first_step, self.imports
        return took - importing, cpu - importing_cpu

    def durations(self, warmup: int, clock: int) -> list[float]:
        """Return the durations of steps after the first `warmup`, without waiting; clock 0 is time, 1 is CPU time."""
        counted = self.steps[warmup - 1 :]
        return [after[0][clock] - before[1][clock] for before, after in itertools.pairwise(counted)]


class Side:
    """A process that runs `ours` or `peer`, with its output in a log."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path, turns: Sequence[int] = ()) -> None:
        """Start the process. `turns`: pipe ends to read and write, whether this side leads, and the steps of a turn."""
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
        """Wait for the end. Raises RunFailed, with the end of the log, unless it made that many steps."""
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
    """Run one side's command to its end. Raises RunFailed."""
    return Side(name, arguments, folder).wait(steps)


def run_in_turns(arguments: Mapping[str, Sequence[str]], folder: Path, steps: int, turn: int) -> dict[str, Stamps]:
    """Run both sides at once, in turns of `turn` steps; the first one leads.

    Raises RunFailed.
    """
    to_first, to_second = os.pipe(), os.pipe()
    ends = [(to_first[0], to_second[1], 1, turn), (to_second[0], to_first[1], 0, turn)]
    sides = []
    with contextlib.ExitStack() as stack:
        for pipe in (*to_first, *to_second):
            stack.callback(os.close, pipe)  # close our copy, so that a side notices the end of the other
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
    """Return the environment of both sides: equal numbers of threads, no spinning, no access to the Hub."""
    threads = os.environ.get("OMP_NUM_THREADS", str(CORES))
    same = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **same}


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

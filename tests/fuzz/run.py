"""`make fuzz`: try every door for its share of some minutes, each in a process of its own, and count what came of it.

python -m tests.fuzz.run MINUTES [FOLDER]     logs go into FOLDER, build/fuzz by default

A door that crashes or hangs ends its process and no more than that. Exit code 1: there were faults, and for each the
table is followed by the command that repeats it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.bounds import SECONDS as HANGING
from tests.fuzz.progress import OUTCOMES

ROOT = Path(__file__).parents[2]
_START = 12.0
"""Seconds that the first process is expected to take for more than trying; later ones take what the last one took."""
_SILENT = 3 * HANGING + 60
"""Seconds without a call that ends, after which a process is taken to hang where Python cannot interrupt it."""
_PYTEST = (sys.executable, "-m", "pytest", "-p", "no:logging")
"""Without pytest's logging, so that what is logged is printed as it is for users, and looked at."""
_POLL = 0.5
_EVERY = 30.0
"""Seconds between two lines, where output is a log."""


@dataclass
class Door:
    """A test of this folder, and how far it is."""

    test: str
    """As pytest is told: `tests/fuzz/test_state.py::test_the_state_of_a_checkpoint`."""
    log: Path
    said: dict[str, Any] = field(default_factory=dict)
    """The last that its process wrote of itself."""
    ending: str | None = None
    """Why it counts as a fault; None while it is none."""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return str(self.said.get("door", self.test.rpartition("::")[2]))

    @property
    def counts(self) -> list[int]:
        return [int(self.said.get(outcome, 0)) for outcome in OUTCOMES]

    @property
    def command(self) -> str:
        """What repeats the fault."""
        seed = self.said.get("seed")
        seeded = "" if seed is None else f"SD3TUNE_FUZZ_SEED={seed} "
        return f"{seeded}{_shown(sys.executable)} -m pytest {shlex.quote(self.test)}"


def main(minutes: float, folder: Path) -> int:
    """Try all doors. Returns the exit code."""
    for stopping in (signal.SIGINT, signal.SIGTERM):  # in the background the first would be ignored
        signal.signal(stopping, signal.default_int_handler)
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    doors, stopped, start = list[Door](), False, _START
    try:
        doors = [Door(test, folder / f"{number:02}.log") for number, test in enumerate(_tests(), 1)]
        for number, door in enumerate(doors):
            share = max((end - time.monotonic()) / (len(doors) - number) - start, 1.0)
            _try(door, share, folder, f"[{number + 1}/{len(doors)}]", end)
            start = max(door.seconds - share, 0.0)
    except KeyboardInterrupt:
        stopped = True
    tried = [door for door in doors if door.said or door.ending]
    print("", *_table(tried), *_faults(tried), sep="\n", flush=True)
    return 130 if stopped else int(any(door.ending for door in doors))


def _tests() -> list[str]:
    of_the_bounds = "--ignore=tests/fuzz/test_bounds.py"  # which tries no door
    words = [*_PYTEST, "--collect-only", "tests/fuzz", of_the_bounds]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    tests = re.findall(r"^tests/fuzz/\S+::.+$", found.stdout, re.MULTILINE)
    if not tests:
        raise SystemExit(f"make fuzz: pytest finds no doors\n{found.stdout}{found.stderr}")
    return tests


def _try(door: Door, seconds: float, folder: Path, place: str, end: float) -> None:
    """Run the door's test for so many seconds, and say now and then how far it is."""
    progress = folder / "progress.json"
    progress.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "SD3TUNE_FUZZ_SECONDS": f"{seconds:.1f}",
        "SD3TUNE_FUZZ_PROGRESS": str(progress),
        "OMP_NUM_THREADS": "1",
    }
    words = [*_PYTEST, door.test, f"--basetemp={folder.absolute() / 'tmp'}"]
    begun = time.monotonic()
    with door.log.open("wb") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            for said in _watched(process, progress, begun):
                door.said = said or door.said
                _say(door, place, begun + seconds, end)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    door.said = _read(progress) or door.said
    door.seconds = time.monotonic() - begun
    door.ending = _ending(process.returncode)
    _line(f"{place} {door.name}: {_in_words(door)}", last=True)


def _watched(process: subprocess.Popen[bytes], progress: Path, begun: float) -> Iterator[dict[str, Any]]:
    """What the process writes of itself, until it ends; one that hangs is made to say where, and killed."""
    heard, before = time.monotonic(), dict[str, Any]()
    while process.poll() is None:
        time.sleep(_POLL)
        said = _read(progress)
        if said != before:
            heard, before = time.monotonic(), said
        if time.monotonic() - heard > _SILENT:
            process.send_signal(signal.SIGABRT)  # upon which pytest's faulthandler prints where Python is
            heard = time.monotonic()
        yield said


def _read(progress: Path) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(progress.read_text())
    except FileNotFoundError:
        return {}
    return said


def _ending(code: int) -> str | None:
    if code == 0:
        return None
    return "failed" if code > 0 else f"crashed or hung ({signal.Signals(-code).name})"


_said_at = 0.0


def _say(door: Door, place: str, door_end: float, end: float) -> None:
    global _said_at
    now = time.monotonic()
    if sys.stdout.isatty() or now - _said_at > _EVERY:
        _said_at = now
        _line(f"{place} {door.name}: {_in_words(door)}; {_left(door_end - now)} left, {_left(end - now)} for all")


def _line(text: str, last: bool = False) -> None:
    """Print a line; on a terminal the next one takes its place, but for the `last` of a door."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{text}", end="\n" if last else "", flush=True)
    else:
        print(text, flush=True)


def _in_words(door: Door) -> str:
    counted = ", ".join(f"{count:,} {outcome}" for count, outcome in zip(door.counts, OUTCOMES, strict=True))
    return f"{sum(door.counts):,} examples ({counted})" + (f", {door.ending}" if door.ending else "")


def _left(seconds: float) -> str:
    whole = max(round(seconds), 0)
    return f"{whole // 60}:{whole % 60:02}"


def _table(doors: Sequence[Door]) -> Iterator[str]:
    """A line for each door and one for all: how many examples were accepted, refused and faults."""
    wide = max((len(door.name) for door in doors), default=0)
    yield f"{'door':<{wide}}  " + "  ".join(f"{outcome:>9}" for outcome in OUTCOMES) + "    time"
    for door in doors:
        accepted, refused, _ = door.counts
        yield _row(door.name, wide, [accepted, refused, int(door.ending is not None)], door.seconds)
    sums = [sum(of) for of in zip(*(door.counts[:2] for door in doors), strict=True)] or [0, 0]
    faults = sum(door.ending is not None for door in doors)
    yield _row("all", wide, [*sums, faults], sum(door.seconds for door in doors))


def _row(name: str, wide: int, counts: Sequence[int], seconds: float) -> str:
    return f"{name:<{wide}}  " + "  ".join(f"{count:>9,}" for count in counts) + f"  {_left(seconds):>6}"


def _faults(doors: Sequence[Door]) -> Iterator[str]:
    for door in doors:
        if door.ending:
            yield f"\n{door.name} {door.ending}; what it was given is at the end of {_shown(door.log)}; again with:"
            yield f"  {door.command}"


def _shown(path: str | Path) -> str:
    absolute = Path(path).absolute()
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "build" / "fuzz"))

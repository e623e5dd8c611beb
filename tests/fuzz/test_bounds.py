"""What the fuzz tests count as a fault: each bound fails a call that leaves it, and no other."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from sd3tune.errors import UserError
from sd3tune.reporting import say
from tests.fuzz import bounds, run
from tests.fuzz.bounds import OUTSIDE, Hang, guarded
from tests.fuzz.door import TRIED, try_door


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The folder of a door; beside it lie files that are not the door's."""
    for folder in ("own", OUTSIDE):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text("a")
    return tmp_path / "own"


FAULTS: dict[str, Callable[[Path], object]] = {
    "an escape on stdout": lambda own: print("\x1b[2J"),
    "a forged line end": lambda own: print("a\rb"),
    "an escape on stderr": lambda own: print("\x1b[2J", file=sys.stderr),
    "an escape from C": lambda own: os.write(1, b"\x1b[2J"),
    "a traceback": lambda own: print("Traceback (most recent call last):", file=sys.stderr),
    "writing elsewhere": lambda own: (own.parent / "b").write_text("b"),
    "writing through a link": lambda own: ((own / "l").symlink_to(own.parent), (own / "l" / "b").write_text("b")),
    "removing": lambda own: (own.parent / OUTSIDE / "a").unlink(),
    "removing a name of a folder that is open": lambda own: os.remove("a", dir_fd=os.open(own.parent / OUTSIDE, 0)),
    "renaming": lambda own: (own / "a").rename(own.parent / "b"),
    "making a folder": lambda own: (own.parent / "b").mkdir(),
    "reading what is not its own": lambda own: (own.parent / OUTSIDE / "a").read_text(),
    "reading through ..": lambda own: (own / ".." / OUTSIDE / "a").read_text(),
    "reading of the machine": lambda own: Path("/etc/passwd").read_text(),
    "asking the network": lambda own: socket.getaddrinfo("localhost", 80),
}
GOOD: dict[str, Callable[[Path], object]] = {
    "printing escaped": lambda own: say("\x1b[2J", "犬"),
    "a bar on stderr": lambda own: print("\r 50 %", file=sys.stderr),
    "writing and reading its own": lambda own: ((own / "b").write_text("b"), (own / "b").read_text()),
    "renaming": lambda own: (own / "a").rename(own / "b"),
    "reading elsewhere": lambda own: Path(__file__).read_text(),
}


@pytest.mark.parametrize("call", FAULTS.values(), ids=list(FAULTS))
def test_a_fault(call: Callable[[Path], object], own: Path) -> None:
    with pytest.raises(AssertionError), guarded(own):
        call(own)


@pytest.mark.parametrize("call", GOOD.values(), ids=list(GOOD))
def test_no_fault(call: Callable[[Path], object], own: Path) -> None:
    with guarded(own):
        call(own)


def test_a_hang(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "SECONDS", 1)
    with pytest.raises(Hang), guarded(own):
        _never_end()


def _never_end() -> None:
    while True:
        try:
            while True:
                pass
        except Exception:  # as code that takes whatever is raised for a damaged file
            continue


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory is mapped")
def test_an_allocation_that_no_machine_has(own: Path) -> None:
    with pytest.raises(MemoryError), guarded(own):
        bytearray(2 * bounds.MAPPED)


def test_a_door_counts_and_fails(own: Path) -> None:
    def call(number: int) -> None:
        if number % 2:
            raise UserError("odd")

    try_door("even", st.integers(0, 9), call, own, known=[1, 2])
    assert TRIED.pop("even").counts["faults"] == 0
    with pytest.raises(ZeroDivisionError):
        try_door("zero", st.integers(0, 9), lambda number: 1 // number, own)
    assert TRIED.pop("zero").counts["faults"]
    with pytest.raises(AssertionError):
        try_door("long", st.just("x" * 9000), _raise_of_its_own, own)
    TRIED.pop("long")


class _Unescaped(UserError):
    def __init__(self, problem: str) -> None:
        self.problems = (problem,)


def _raise_of_its_own(problem: str) -> None:
    raise _Unescaped(problem)


def test_the_table_names_each_fault_and_how_to_repeat_it(tmp_path: Path) -> None:
    good = run.Door("tests/fuzz/test_a.py::test_a", tmp_path / "1.log", {"door": "a", "accepted": 2000, "refused": 5})
    bad = run.Door("tests/fuzz/test_b.py::test_b[x]", tmp_path / "2.log", {"door": "b", "faults": 7, "seed": 3})
    bad.ending = "failed"
    table = list(run._table([good, bad]))
    assert [line.split()[:4] for line in table[1:]] == [
        ["a", "2,000", "5", "0"],
        ["b", "0", "0", "1"],
        ["all", "2,000", "5", "1"],
    ]
    assert list(run._faults([good])) == []
    named, command = run._faults([bad])
    assert "2.log" in named
    assert command.strip().startswith("SD3TUNE_FUZZ_SEED=3 ")
    assert command.endswith("-m pytest 'tests/fuzz/test_b.py::test_b[x]'")

"""A run that dies at any point of its own making is resumed and ends as one that was never stopped.

One run copies what a death at each point would leave, and every copy is put in the run's place and resumed, so that
none has to die (test_kills.py kills real processes). The points are counted, not listed by hand; at some of them a
write can also be torn. Every kind of point, an operation on a sort of file, is tried once, some of them by
`make check-long`; `make crash` tries all that leave something different on the disk.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence, Set
from functools import partial
from pathlib import Path

import pytest

from sd3tune.training.checkpoint import list_checkpoints
from tests.run.crash.attempts import Attempt
from tests.run.crash.conftest import begun_from, steps_of
from tests.run.crash.points import Death, Point, copy, keeping, kept_in, listing, read_points

ALL = bool(os.environ.get("SD3TUNE_EVERY_CRASH_POINT"))
PARTS = {"lora": 8, "full": 8} if ALL else {"lora": 6, "full": 2}
"""Tests for each method, for processes of pytest to share."""
SHORT = 8 if ALL else 4
"""Parts that `make test` runs, of those that have every kind of point; `make check-long` runs the others."""

Kind = tuple[str, str]


@pytest.fixture(scope="session")
def points_of(prepare, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Point]]:
    """`points_of(method)`: every point of that run, in order."""

    @functools.cache
    def points(method: str) -> list[Point]:
        folder = prepare(tmp_path_factory.mktemp("points"), method)
        ended = Attempt(folder, inside=partial(listing, folder / "work", folder / "points")).end()
        assert ended.code == 0, ended.printed
        return read_points(folder / "points")

    return points


def deaths(points: Sequence[Point]) -> list[Death]:
    """Where a run must die to leave everything that it can leave: most points leave what the one before them does."""
    found: dict[str, Death] = {}
    for number, point in enumerate(points):
        found.setdefault(point.left, (number, False))
        if point.torn:
            found.setdefault(point.torn, (number, True))
    return list(found.values())


def one_of_each_kind(points: Sequence[Point], known: Set[Kind] = frozenset()) -> list[Death]:
    """Of the n deaths of the k-th kind number k mod n, so that first and last ones, before and after, take turns.

    Only torn ones where there are any: they do all the harm that the others do. `known` kinds are left out.
    """
    kinds: dict[Kind, list[Death]] = {}
    for death in deaths(points):
        kinds.setdefault(points[death[0]].kind, []).append(death)
    worst = [[death for death in of if death[1]] or of for kind, of in kinds.items() if kind not in known]
    return [of[number % len(of)] for number, of in enumerate(worst)]


def chosen(method: str, points_of: Callable[[str], list[Point]]) -> list[Death]:
    """Of a full run by default only the kinds that a LoRA's does not have."""
    points = points_of(method)
    if ALL:
        return deaths(points)
    known = {point.kind for point in points_of("lora")} if method == "full" else set()
    return one_of_each_kind(points, known)


@pytest.mark.parametrize(
    ("method", "part"),
    [
        pytest.param(method, part, marks=[pytest.mark.long] * (part >= SHORT))
        for method in PARTS
        for part in range(PARTS[method])
    ],
)
def test_a_run_that_dies_anywhere_ends_as_one_never_stopped(
    method: str, part: int, points_of, straight_run, prepare, tmp_path: Path, assert_equal_workspaces
) -> None:
    folder, chosen_here = prepare(tmp_path / "here", method), chosen(method, points_of)[part :: PARTS[method]]
    kept = tmp_path / "kept"
    kept.mkdir()
    ended = Attempt(folder, inside=partial(keeping, folder / "work", kept, set(chosen_here))).end()
    assert ended.code == 0, ended.printed
    failed = []
    for death in chosen_here:
        shutil.rmtree(folder / "work")
        copy(kept_in(kept, death), folder / "work")
        try:
            resume(folder)
            assert_equal_workspaces(straight_run(method), folder)
        except AssertionError as error:
            failed.append(f"{kept_in(kept, death)} (kept): {points_of(method)[death[0]]}: {str(error)[:2000]}")
        else:
            shutil.rmtree(kept_in(kept, death))
    assert not failed, f"{len(failed)} deaths did harm:\n" + "\n".join(failed)


def resume(folder: Path) -> None:
    run = folder / "work" / "run"
    saved = list_checkpoints(run)
    ended = Attempt(folder, "--resume").end()
    assert ended.code == 0, ended.printed
    if "already finished" not in ended.printed:
        assert begun_from(ended.printed) == (int(saved[-1].name[-6:]) if saved else 0)
    assert steps_of(run / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps_of(run / "validation.jsonl") == [0, 2, 4]


@pytest.mark.parametrize(("method", "more"), [("lora", set()), ("full", {"os.link"})])
def test_every_operation_has_a_point_before_and_after_it(points_of, method: str, more: set[str]) -> None:
    counts = Counter((point.when, point.operation, point.name) for point in points_of(method))
    before = {key[1:]: count for key, count in counts.items() if key[0] == "before"}
    after = {key[1:]: count for key, count in counts.items() if key[0] == "after"}
    assert before == after
    assert {operation for operation, _ in before} == more | {
        "open", "write", "fsync", "os.rename", "os.remove", "os.rmdir", "os.mkdir",
    }  # fmt: skip

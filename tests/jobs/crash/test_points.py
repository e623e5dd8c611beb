"""A run that dies at any point of its own making is resumed and ends as one that was never stopped.

The points are counted, not listed by hand; at some of them a write can also be torn. By default every kind of point,
an operation on a sort of file, is tried once; `make crash` tries all.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from sd3tune.train.checkpoint import list_checkpoints
from tests.jobs.crash.attempts import Attempt
from tests.jobs.crash.conftest import begun_from, steps_of
from tests.jobs.crash.points import DIED, Point, dying, listing, read_points

ALL = bool(os.environ.get("SD3TUNE_EVERY_CRASH_POINT"))
PARTS = 16 if ALL else 4
"""Tests, for processes of pytest to share."""

Death = tuple[int, bool]
"""The number of the point, and whether what is not synced there is torn."""


@pytest.fixture(scope="session")
def points(prepare, tmp_path_factory: pytest.TempPathFactory) -> list[Point]:
    folder = prepare(tmp_path_factory.mktemp("points"))
    ended = Attempt(folder, inside=partial(listing, folder / "work", folder / "points")).end()
    assert ended.code == 0, ended.printed
    return read_points(folder / "points")


def deaths(points: Sequence[Point]) -> list[Death]:
    every = [(number, torn) for number, point in enumerate(points) for torn in (False, True)[: 1 + point.unsynced]]
    return every if ALL else one_of_each_kind(points, every)


def one_of_each_kind(points: Sequence[Point], every: Sequence[Death]) -> list[Death]:
    """Of the n deaths of the k-th kind number k mod n, so that first and last ones, before and after, take turns.

    Only torn ones where there are any: they do all the harm that the others do.
    """
    kinds: dict[tuple[str, str], list[Death]] = {}
    for death in every:
        kinds.setdefault(points[death[0]].kind, []).append(death)
    worst = [[death for death in of if death[1]] or of for of in kinds.values()]
    return [of[number % len(of)] for number, of in enumerate(worst)]


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_that_dies_anywhere_ends_as_one_never_stopped(
    part: int, points: list[Point], straight: Path, prepare, tmp_path: Path, assert_equal_workspaces
) -> None:
    failed = []
    for number, torn in deaths(points)[part::PARTS]:
        folder = prepare(tmp_path / f"{number}-{torn}")
        try:
            die_and_resume(folder, number, torn, partial(assert_equal_workspaces, straight, folder))
        except AssertionError as error:
            failed.append(f"{folder} (kept): {points[number]}: {str(error)[:2000]}")
        else:
            shutil.rmtree(folder)
    assert not failed, f"{len(failed)} deaths did harm:\n" + "\n".join(failed)


def die_and_resume(folder: Path, number: int, torn: bool, check: Callable[[], None]) -> None:
    died = Attempt(folder, inside=partial(dying, folder / "work", number, torn)).end()
    assert died.code == DIED, died.printed
    run = folder / "work" / "run"
    saved = list_checkpoints(run)
    ended = Attempt(folder, "--resume").end()
    assert ended.code == 0, ended.printed
    if "already finished" not in ended.printed:
        assert begun_from(ended.printed) == (int(saved[-1].name[-6:]) if saved else 0)
    assert steps_of(run / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps_of(run / "validation.jsonl") == [0, 2, 4]
    check()


def test_every_operation_has_a_point_before_and_after_it(points: list[Point]) -> None:
    counts = Counter((point.when, point.operation, point.name) for point in points)
    before = {key[1:]: count for key, count in counts.items() if key[0] == "before"}
    after = {key[1:]: count for key, count in counts.items() if key[0] == "after"}
    assert before == after
    assert {operation for operation, _ in before} == {
        "open", "write", "fsync", "os.rename", "os.remove", "os.rmdir", "os.mkdir",
    }  # fmt: skip

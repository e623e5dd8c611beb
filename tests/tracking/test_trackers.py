"""The order in which trackers are told things, and that none of them can harm a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import pytest

from sd3tune.config.public import public_config
from sd3tune.config.sections.outputs import TrackingConfig
from sd3tune.tracking import trackers as module
from sd3tune.tracking.base import Start
from sd3tune.tracking.trackers import TrackerKind, Trackers, is_log, scalars

NO_FILES = re.compile("(?!)")


class Recorder:
    """A tracker that keeps what it is told, and fails from `fails_at` on."""

    where = "in memory"

    def __init__(self, fails_at: int | None = None) -> None:
        self.told: list[tuple[int, str]] = []
        self.fails_at = fails_at
        self.finished: bool | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("the line\nis dead")
        self.told += [(step, name) for name in values]

    def image(self, step: int, name: str, path: Path, caption: str) -> None:
        self.told.append((step, f"{name}: {caption}"))

    def close(self, finished: bool) -> None:
        self.finished = finished


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setitem(module.TRACKERS, "tensorboard", TrackerKind(lambda settings, start, warn: made, NO_FILES))
    return made


def make(said: list[str] | None = None) -> Trackers:
    start = Start("run", Path("logs"), {})
    return Trackers(TrackingConfig(tensorboard=True), start, ([] if said is None else said).append)


def picture(trackers: Trackers, step: int) -> None:
    trackers.image(step, "preview/0", Path("x.png"), "a dog")


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0}


def test_what_belongs_to_a_step_waits_for_its_line(recorder: Recorder) -> None:
    trackers = make()
    picture(trackers, 0)  # no line will come for it
    assert recorder.told == [(0, "preview/0: a dog")]
    picture(trackers, 2)
    trackers.log(2, {"validation": {"loss": 2.0}})
    assert len(recorder.told) == 1
    for step in (1, 2):  # a window of lines, as it is written when it is full
        trackers.line(line(step))
    picture(trackers, 2)
    assert recorder.told[1:] == [
        (1, "loss"), (2, "loss"), (2, "preview/0: a dog"), (2, "validation/loss"), (2, "preview/0: a dog")
    ]  # fmt: skip


def test_steps_ascend_when_a_resumed_run_tells_its_pictures_before_its_lines(recorder: Recorder) -> None:
    trackers = make()
    for step in (0, 2, 4, 9):
        picture(trackers, step)
    for step in (1, 2, 3, 4):
        trackers.line(line(step))
    steps = [step for step, _ in recorder.told]
    assert steps == sorted(steps)
    assert [step for step, what in recorder.told if what != "loss"] == [0, 2, 4]
    for step in range(5, 10):
        trackers.line(line(step))
    assert recorder.told[-1] == (9, "preview/0: a dog")


def test_a_tracker_that_fails_is_named_once_and_left_out(recorder: Recorder) -> None:
    recorder.fails_at, said = 2, []
    with make(said) as trackers:
        for step in (1, 2, 3):
            trackers.line(line(step))
        assert trackers.where() == []
    assert said == ["warning: tracking.tensorboard: the line is dead; the run continues without it"]
    assert trackers.warnings == [said[0].removeprefix("warning: ")]
    assert recorder.told == [(1, "loss")]


def test_a_tracker_that_cannot_start_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(settings: Any, start: Start, warn: Any) -> Recorder:
        raise ImportError("libfoo.so: not found")

    monkeypatch.setitem(module.TRACKERS, "tensorboard", TrackerKind(broken, NO_FILES))
    said: list[str] = []
    with make(said) as trackers:
        trackers.line(line(1))
    assert said == ["warning: tracking.tensorboard: libfoo.so: not found; the run continues without it"]


def test_the_files_of_a_tracker_are_those_that_it_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh start deletes all of them (`is_log`), a tracker those in its folder; nobody's other files."""

    def start_anew(settings: Any, start: Start, warn: Any) -> Recorder:
        start.remove_earlier("tensorboard")
        return Recorder()

    names = ("tensorboard/curve.bin", "tensorboard/mine.txt", "tensorboard/events.out.tfevents.1", "curve_id")
    assert [is_log(PurePath(name)) for name in names] == [False, False, True, False]
    declared = TrackerKind(start_anew, re.compile(r"tensorboard/curve\.bin|curve_id"))
    monkeypatch.setitem(module.TRACKERS, "tensorboard", declared)
    assert [is_log(PurePath(name)) for name in names] == [True, False, False, True]
    for path in (tmp_path / "logs" / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Trackers(TrackingConfig(tensorboard=True), Start("run", tmp_path / "logs", {}), lambda line: None)
    assert [(tmp_path / "logs" / name).exists() for name in names] == [False, True, True, True]


def test_a_tracker_is_told_whether_the_run_finished(recorder: Recorder) -> None:
    with make():
        pass
    assert recorder.finished is True
    with pytest.raises(KeyboardInterrupt), make():
        raise KeyboardInterrupt
    assert recorder.finished is False


def test_scalars_are_the_numbers_of_a_line() -> None:
    values = {"loss": None, "lr": 1e-4, "loss_by_sigma": {"0.2-0.4": 1, "0.4-0.6": None}, "suspects": ["a.png"]}
    assert scalars(values) == {"lr": 1e-4, "loss_by_sigma/0.2-0.4": 1.0}


def test_the_configuration_is_shown_whole_and_public_config(quick_config, tmp_path: Path) -> None:
    shown = public_config(quick_config(tmp_path / "here"))
    assert shown["output_dir"] == "here"
    assert shown["data"]["sources"][0]["path"]
    assert "/" not in shown["data"]["sources"][0]["path"]
    assert shown["optimizer"]["lr"] == 1e-2
    assert shown.keys() == quick_config(tmp_path / "here").model_dump().keys()

"""What nano is asked to draw, and that a drawing of it counts as right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sd3tune.nano.tasks import (
    INSTANCES,
    NAME,
    Task,
    class_tasks,
    plain_tasks,
    rich_tasks,
    share_right,
    subject_caption,
    subject_tasks,
)
from sd3tune.nano.world import SUBJECT, is_held_out, parse, render


@pytest.mark.parametrize(
    "tasks",
    [
        plain_tasks(60, False, 0),
        plain_tasks(60, True, 0),
        rich_tasks(60, False, 0),
        rich_tasks(60, True, 0),
        subject_tasks(60, 0),
        class_tasks(60, 0),
    ],
    ids=["plain", "plain held out", "rich", "rich held out", "subject", "class"],
)
def test_the_worlds_own_drawings_are_right_and_each_others_are_not(tasks: list[Task]) -> None:
    drawn = [render(task.scene, task.seed) for task in tasks]
    assert share_right(tasks, drawn) >= 0.98
    assert share_right(tasks, drawn[1:] + drawn[:1]) < 0.1
    assert len({task.seed for task in tasks}) == len(tasks)


def test_held_out_tasks_are_held_out() -> None:
    for make in (plain_tasks, rich_tasks):
        assert all(is_held_out(task.scene) for task in make(40, True, 1))
        assert not any(is_held_out(task.scene) for task in make(40, False, 1))


def test_every_scene_comes_before_any_comes_again() -> None:
    tasks = plain_tasks(40, True, 1)
    once = {task.prompt for task in tasks[:26]}
    assert len(once) == 26
    assert {task.prompt for task in tasks[26:]} <= once


def test_rich_tasks_ask_for_more_than_plain_ones() -> None:
    for task in rich_tasks(60, False, 2):
        thing = task.scene.thing
        assert thing.size or thing.texture or task.scene.place or task.scene.relation
        assert parse(task.prompt) == task.scene


def test_the_subject_is_asked_for_by_its_name_where_no_picture_shows_it() -> None:
    shown = {(scene.thing.colour, scene.background) for scene in INSTANCES}
    for task in subject_tasks(60, 0):
        assert task.scene.thing.shape == SUBJECT
        assert (task.scene.thing.colour, task.scene.background) not in shown
        assert task.prompt == subject_caption(task.scene)
        assert f"{NAME} shape" in task.prompt
        assert SUBJECT not in task.prompt


def test_a_subject_where_the_class_was_asked_for_is_wrong() -> None:
    tasks = class_tasks(20, 0)
    hearts = [render(replace(task.scene, thing=replace(task.scene.thing, shape=SUBJECT)), task.seed) for task in tasks]
    assert share_right(tasks, hearts) == 0

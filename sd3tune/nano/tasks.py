"""Tasks for a model of this world: scenes to draw, and their prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from sd3tune.nano.oracle import Verdict, judge, judge_reading, read
from sd3tune.nano.world import CLASS, COLOURS, SHAPES, SUBJECT, Scene, Thing, plain_scenes, random_scene

NAME = "sks"
"""Name of the subject in captions and prompts: a word that occurs in no base training caption."""
INSTANCES = tuple(
    Scene(background, Thing(colour, SUBJECT))
    for colour, background in (
        ("red", "white"),
        ("green", "black"),
        ("blue", "yellow"),
        ("yellow", "purple"),
        ("purple", "green"),
        ("white", "blue"),
    )
)
"""The scenes of the six pictures of the subject that a LoRA trains on."""

CLASS_PROMPTS = (
    Thing("", CLASS).phrase,
    *(Thing("", shape).phrase for shape in SHAPES),
    *(replace(scene, thing=replace(scene.thing, shape=CLASS)).caption for scene in INSTANCES),
)
"""Captions that a LoRA of the subject should not change: the class, other shapes, the subject's without its name."""


@dataclass(frozen=True)
class Task:
    """A prompt, its scene, and the seed of the picture."""

    prompt: str
    scene: Scene
    seed: int

    def judge(self, image: Image.Image) -> Verdict:
        return judge(image, self.scene)

    def is_shown_by(self, image: Image.Image) -> bool:
        """Return True if the picture shows the scene; for the class, the subject is wrong."""
        reading = read(image)
        is_subject = self.scene.thing.shape == CLASS and any(thing.shape == SUBJECT for thing in reading.things)
        return judge_reading(reading, self.scene).right and not is_subject


def share_right(tasks: Sequence[Task], images: Sequence[Image.Image]) -> float:
    """Return the share of pictures that show their task's scene."""
    return sum(task.is_shown_by(image) for task, image in zip(tasks, images, strict=True)) / len(tasks)


def plain_tasks(count: int, held_out: bool, seed: int) -> list[Task]:
    """Return tasks `a {colour} {shape} on a {colour} background`: combinations of the training, or held-out ones."""
    return _drawn(plain_scenes(held_out), count, seed)


def rich_tasks(count: int, held_out: bool, seed: int) -> list[Task]:
    """Return tasks with sizes, textures, places and second things."""
    chance = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(chance, held_out)
        complete = scene.background and all(thing.colour and thing.shape != CLASS for thing in scene.things)
        if complete and scene != Scene(scene.background, Thing(scene.thing.colour, scene.thing.shape)):
            scenes.append(scene)
    return [Task(scene.caption, scene, seed + number) for number, scene in enumerate(scenes)]


def subject_tasks(count: int, seed: int) -> list[Task]:
    """Return tasks for the subject in colours and on backgrounds that its pictures do not have."""
    shown = set(INSTANCES)
    scenes = (Scene(background, Thing(colour, SUBJECT)) for background in COLOURS for colour in COLOURS)
    unseen = [scene for scene in scenes if scene not in shown and scene.thing.colour != scene.background]
    return [replace(task, prompt=subject_caption(task.scene)) for task in _drawn(unseen, count, seed)]


def class_tasks(count: int, seed: int) -> list[Task]:
    """Return tasks for the class without the subject's name, `a {colour} shape on ...`: any other shape is right."""
    scenes = (Scene(background, Thing(colour, CLASS)) for background in COLOURS for colour in COLOURS)
    return _drawn([scene for scene in scenes if scene.thing.colour != scene.background], count, seed)


def subject_caption(scene: Scene) -> str:
    """Return the caption of a picture of the subject: its name before the class noun."""
    return scene.caption.replace(SUBJECT, f"{NAME} {CLASS}")


def _drawn(scenes: Sequence[Scene], count: int, seed: int) -> list[Task]:
    """Return `count` scenes in shuffled order; none repeats before all have occurred."""
    order = list(scenes)
    random.Random(seed).shuffle(order)
    chosen = [order[number % len(order)] for number in range(count)]
    return [Task(scene.caption, scene, seed + number) for number, scene in enumerate(chosen)]

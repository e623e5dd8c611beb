"""Tasks for a model of this world: scenes to draw, and their prompts."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from sd3tune.nano.oracle import Verdict, judge, judge_reading, needs_everything, read
from sd3tune.nano.world import (
    CLASS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SUBJECT,
    SUBJECTS,
    Scene,
    Thing,
    plain_scenes,
    random_scene,
)

NAME, OTHER_NAME = "sks", "tok"
"""Names of a subject or style, and of a second subject, in captions: words in no base training caption.

Words disturb nano differently: of 16 prompts, it draws a clean shape of the right colour on the right background for 16
with `tok`, 5 with `sks`, and 1 with `zwx`, under which a LoRA of the demo's recipe learned crowns for 4 of 24 prompts.
"""
_INSTANCE_COLOURS = (
    ("red", "white"),
    ("green", "black"),
    ("blue", "yellow"),
    ("yellow", "purple"),
    ("purple", "green"),
    ("white", "blue"),
)


def instances(subject: str) -> tuple[Scene, ...]:
    """Return the scenes of the six pictures of a subject that a LoRA trains on."""
    return tuple(Scene(background, Thing(colour, subject)) for colour, background in _INSTANCE_COLOURS)


INSTANCES = instances(SUBJECT)


def style_instances(style: str) -> tuple[Scene, ...]:
    """Return the scenes of the twelve pictures of a style that a LoRA trains on: two of each shape."""
    pairs = [*_INSTANCE_COLOURS, *((background, colour) for colour, background in _INSTANCE_COLOURS)]
    shapes = (*SHAPES, *SHAPES[1:], SHAPES[0])
    return tuple(
        Scene(background, Thing(colour, shape), style=style)
        for (colour, background), shape in zip(pairs, shapes, strict=True)
    )


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
    taught: str = SUBJECT
    """The subject or style that a LoRA learned; wrong where the scene does not ask for it."""

    def judge(self, image: Image.Image) -> Verdict:
        return judge(image, self.scene)

    def is_shown_by(self, image: Image.Image) -> bool:
        """Return True if the picture shows the scene; for the class, the subject is wrong."""
        reading = read(image, self.taught != SUBJECT or needs_everything(self.scene))
        if not judge_reading(reading, self.scene).right:
            return False
        is_class = self.scene.thing.shape == CLASS
        return not any(
            (is_class and thing.shape == self.taught) or (not self.scene.style and thing.style == self.taught)
            for thing in reading.things
        )


def share_right(tasks: Sequence[Task], images: Sequence[Image.Image]) -> float:
    """Return the share of pictures that show their task's scene."""
    return sum(task.is_shown_by(image) for task, image in zip(tasks, images, strict=True)) / len(tasks)


def plain_tasks(count: int, held_out: bool, seed: int, shapes: Collection[str] = SHAPES) -> list[Task]:
    """Return tasks `a {colour} {shape} on a {colour} background`: combinations of the training, or held-out ones."""
    return _drawn([scene for scene in plain_scenes(held_out) if scene.thing.shape in shapes], count, seed)


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


def subject_tasks(count: int, seed: int, subject: str = SUBJECT) -> list[Task]:
    """Return tasks for a subject in colours and on backgrounds that its pictures do not have."""
    shown = set(instances(subject))
    scenes = (Scene(background, Thing(colour, subject)) for background in COLOURS for colour in COLOURS)
    unseen = [scene for scene in scenes if scene not in shown and scene.thing.colour != scene.background]
    return [replace(task, prompt=subject_caption(task.scene)) for task in _drawn(unseen, count, seed, subject)]


def class_tasks(count: int, seed: int, subject: str = SUBJECT) -> list[Task]:
    """Return tasks for the class without the subject's name, `a {colour} shape on ...`: any other shape is right.

    Colours and backgrounds are not those of the subject's pictures: priors name these.
    """
    scenes = (
        Scene(background, Thing(colour, CLASS))
        for background in COLOURS
        for colour in COLOURS
        if colour != background and (colour, background) not in _INSTANCE_COLOURS
    )
    return _drawn(list(scenes), count, seed, subject)


def style_tasks(count: int, seed: int, style: str) -> list[Task]:
    """Return tasks for a style, by its name, in combinations that its pictures do not have."""
    shown = {replace(scene, style="") for scene in style_instances(style)}
    unseen = [replace(scene, style=style) for scene in plain_scenes(held_out=False) if scene not in shown]
    return [replace(task, prompt=style_caption(task.scene)) for task in _drawn(unseen, count, seed, style)]


def unstyled_tasks(count: int, seed: int, style: str) -> list[Task]:
    """Return plain tasks, wrong if drawn in the style."""
    return _drawn(plain_scenes(held_out=False), count, seed, style)


def composition_tasks(count: int, seed: int, subjects: tuple[str, str]) -> list[Task]:
    """Return tasks for two subjects in one picture, called `NAME` and `OTHER_NAME`."""
    chance = random.Random(seed)
    scenes = []
    for _ in range(count):
        background, *colours = chance.sample(list(COLOURS), 3)
        thing, other = (Thing(colour, subject) for colour, subject in zip(colours, subjects, strict=True))
        scenes.append(Scene(background, thing, relation=chance.choice(RELATIONS), other=other))
    tasks = _drawn(scenes, count, seed, subjects[0])
    return [replace(task, prompt=subject_caption(task.scene)) for task in tasks]


def subject_caption(scene: Scene) -> str:
    """Return the caption of a picture of subjects: in place of each, its name before the class noun."""
    thing = replace(scene.thing, shape=f"{NAME} {CLASS}")
    is_subject = scene.other is not None and scene.other.shape in SUBJECTS
    other = replace(scene.other, shape=f"{OTHER_NAME} {CLASS}") if scene.other and is_subject else scene.other
    return replace(scene, thing=thing, other=other).caption


def style_caption(scene: Scene) -> str:
    """Return the caption of a picture in a style: its name in place of the style's word."""
    return replace(scene, style=NAME).caption


def _drawn(scenes: Sequence[Scene], count: int, seed: int, taught: str = SUBJECT) -> list[Task]:
    """Return `count` scenes in shuffled order; none repeats before all have occurred."""
    order = list(scenes)
    random.Random(seed).shuffle(order)
    chosen = [order[number % len(order)] for number in range(count)]
    return [Task(scene.caption, scene, seed + number, taught) for number, scene in enumerate(chosen)]

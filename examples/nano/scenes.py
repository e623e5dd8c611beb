"""Scenes beyond the training mix of nano's transformer: with more texture, with subjects, and in styles."""

from __future__ import annotations

import random
from dataclasses import replace

from sd3tune.nano.figures import FIGURES
from sd3tune.nano.world import STYLES, SUBJECTS, TEXTURES, Scene, Thing, complete, random_scene


def textured_scene(chance: random.Random) -> Scene:
    """Return a scene of the mix whose things have a texture, two in three of them dots."""
    scene = random_scene(chance)
    things = [replace(thing, texture=chance.choice((*TEXTURES[1:], "dotted"))) for thing in scene.things]
    return _with_things(scene, things)


def subject_scene(chance: random.Random) -> Scene:
    """Return a scene of the mix with a subject as its first thing, and in half of the pairs as its second."""
    scene = random_scene(chance)
    names = chance.sample(SUBJECTS, 2)
    if scene.other and chance.random() < 0.5:
        names[1] = scene.other.shape
    return _with_things(scene, [_as(name, thing) for thing, name in zip(scene.things, names, strict=False)])


def styled_scene(chance: random.Random) -> Scene:
    """Return a scene in a style, without textures; one in three shows a subject, and none small things in blocks."""
    while True:
        scene = subject_scene(chance) if chance.random() < 1 / 3 else random_scene(chance)
        style = chance.choice(STYLES[1:])
        if style != "pixelated" or not (scene.other or scene.thing.size == "small"):
            break
    plain = _with_things(scene, [replace(thing, texture="") for thing in scene.things])
    return replace(plain, style=style)


def any_scene(chance: random.Random) -> Scene:
    """Return a scene of everything in the world, with all words, also in combinations that nano's training lacks."""
    draw_scene = chance.choices((random_scene, textured_scene, subject_scene, styled_scene), (30, 15, 35, 20))[0]
    scene = random_scene(chance, held_out=True) if chance.random() < 0.1 else draw_scene(chance)
    return complete(scene, chance)


def _as(name: str, thing: Thing) -> Thing:
    """Return the thing as that figure, whose own texture needs no word."""
    return replace(thing, shape=name, texture="" if FIGURES[name].texture else thing.texture)


def _with_things(scene: Scene, things: list[Thing]) -> Scene:
    return replace(scene, thing=things[0], other=things[1] if scene.other else None)

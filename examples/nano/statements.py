"""What captions state about scenes, as numbers: so that every caption can be compared with every picture at once."""

from __future__ import annotations

import random
from dataclasses import replace

from sd3tune.nano.world import (
    CLASS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    STYLES,
    SUBJECTS,
    TEXTURES,
    Scene,
    Thing,
)

_COLOURS, _SHAPES = ("", *COLOURS), ("", *SHAPES, *SUBJECTS)


def statement(scene: Scene) -> list[int]:
    """Return a number per attribute; 0 stands for a word that a caption lacks, or a picture's plain state.

    A caption fits a picture of a complete scene if each of its numbers is 0 or the picture's.
    """
    thing, other = scene.thing, scene.other or Thing("", "")
    return [
        len(scene.things),
        _COLOURS.index(scene.background),
        PLACES.index(scene.place),
        ("", *RELATIONS).index(scene.relation),
        STYLES.index(scene.style),
        *(number for one in (thing, other) for number in _of_thing(one)),
    ]


def _of_thing(thing: Thing) -> list[int]:
    return [
        _COLOURS.index(thing.colour),
        0 if thing.shape == CLASS else _SHAPES.index(thing.shape),
        SIZES.index(thing.size),
        TEXTURES.index(thing.texture),
    ]


def only_nouns(scene: Scene) -> Scene:
    """Return the scene with the words for its shapes and their relation alone."""
    other = Thing("", scene.other.shape) if scene.other else None
    return Scene("", Thing("", scene.thing.shape), relation=scene.relation, other=other)


def with_fewer_words(scene: Scene, chance: random.Random) -> Scene:
    """Return the scene with some of its words left out; the number of things and their relation stay."""

    def kept(word: str, instead: str = "") -> str:
        return word if chance.random() < 0.6 else instead

    def fewer(thing: Thing) -> Thing:
        return Thing(kept(thing.colour), kept(thing.shape, CLASS), kept(thing.size), kept(thing.texture))

    other = fewer(scene.other) if scene.other else None
    thing = fewer(scene.thing)
    return replace(scene, background=kept(scene.background), thing=thing, place=kept(scene.place), other=other)


def with_a_wrong_word(scene: Scene, chance: random.Random) -> Scene:
    """Return the scene with one of its words replaced by another of its kind."""

    def wrong(words: tuple[str, ...], right: str) -> str:
        return chance.choice([word for word in words if word not in ("", right)])

    thing = scene.thing
    changes = [
        replace(scene, background=wrong(_COLOURS, scene.background)),
        replace(scene, thing=replace(thing, colour=wrong(_COLOURS, thing.colour))),
        replace(scene, thing=replace(thing, shape=wrong(_SHAPES, thing.shape))),
        replace(scene, thing=replace(thing, texture=wrong(TEXTURES, thing.texture))),
        replace(scene, style=wrong(STYLES, scene.style)),
    ]
    if scene.other:
        changes.append(replace(scene, relation=wrong(RELATIONS, scene.relation)))
        changes.append(replace(scene, other=replace(scene.other, shape=wrong(_SHAPES, scene.other.shape))))
        changes.append(replace(scene, other=replace(scene.other, colour=wrong(_COLOURS, scene.other.colour))))
    else:
        changes.append(replace(scene, thing=replace(thing, size=wrong(SIZES, thing.size))))
        changes.append(replace(scene, place=wrong(PLACES, scene.place)))
    return chance.choice(changes)

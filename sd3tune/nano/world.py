"""The grammar of nano's captions, the scenes they describe, and the drawing of a scene.

    a red circle on a blue background
    a small striped red circle at the top on a blue background
    a red circle above a yellow star on a blue background
    a red circle on a blue background in outline style

Words may be left out ("a circle", "a red shape on a white background"); the seed of a drawing then decides.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image

from sd3tune.nano.figures import FIGURES
from sd3tune.nano.shapes import STYLED, Placed, paint, pixelated

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (40, 90, 220),
    "yellow": (245, 212, 40),
    "purple": (140, 60, 190),
    "orange": (245, 130, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SUBJECT = "heart"
"""The first of `SUBJECTS`, which the demo teaches."""
SUBJECTS = tuple(name for name in FIGURES if name not in SHAPES)
"""Things that occur in no training picture, for LoRAs to learn: shapes, figures of two parts, a striped mascot."""
CLASS = "shape"
"""The noun that stands for any of SHAPES."""
SIZES = ("", "small", "large")
TEXTURES = ("", "striped", "dotted")
PLACES = ("", "on the left", "on the right", "at the top", "at the bottom")
STYLES = ("", *STYLED, "pixelated")
"""Ways to draw a scene; all but "" occur in no training picture, for LoRAs to learn."""
RELATIONS = ("left of", "right of", "above", "below")

_RADIUS = {"small": 0.19, "": 0.30, "large": 0.42}  # as fractions of the picture's side, of a single thing
_PAIR_RADIUS, _PAIR_DISTANCE = 0.19, 0.46
_PLACED_AT = {
    "": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
_RELATED_AT = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}  # position of the first thing relative to the other


@dataclass(frozen=True)
class Thing:
    """A thing to draw; "" is a random colour, medium size and plain texture."""

    colour: str
    shape: str
    size: str = ""
    texture: str = ""

    @property
    def phrase(self) -> str:
        words = [word for word in (self.size, self.texture, self.colour, self.shape) if word]
        return f"{_article(words[0])} {' '.join(words)}"


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; "" is a random background, or no style."""

    background: str
    thing: Thing
    place: str = ""
    relation: str = ""
    other: Thing | None = None
    style: str = ""

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.thing, self.other) if self.other else (self.thing,)

    @property
    def caption(self) -> str:
        second = f"{self.relation} {self.other.phrase}" if self.other else ""
        ground = f"on {_article(self.background)} {self.background} background" if self.background else ""
        style = f"in {self.style} style" if self.style else ""
        return " ".join(part for part in (self.thing.phrase, self.place, second, ground, style) if part)


def held_out(thing: Thing, background: str) -> bool:
    """Return True if training excludes this combination of colour, shape and background: one in twelve."""
    if thing.shape not in SHAPES or not thing.colour or not background:
        return False
    colours = list(COLOURS)
    return (colours.index(thing.colour) + 5 * SHAPES.index(thing.shape) + 3 * colours.index(background)) % 12 == 0


def is_held_out(scene: Scene) -> bool:
    """Return True if the scene contains a held-out combination."""
    return any(held_out(thing, scene.background) for thing in scene.things)


def plain_scenes(held_out: bool) -> list[Scene]:
    """Return all scenes "a {colour} {shape} on a {colour} background" of the training, or the held-out ones."""
    scenes = (
        Scene(background, Thing(colour, shape))
        for colour, shape, background in itertools.product(COLOURS, SHAPES, COLOURS)
        if colour != background
    )
    return [scene for scene in scenes if is_held_out(scene) == held_out]


def random_scene(random: random.Random, held_out: bool = False) -> Scene:
    """Return a scene of the training mix: 45 % plain, 30 % with size, texture or place, 25 % pairs.

    One in ten lacks words. With `held_out`, the scene is a held-out one, with all words.
    """
    while True:
        draw = random.random()
        scene = _plain(random) if draw < 0.45 else _rich(random) if draw < 0.75 else _pair(random)
        if is_held_out(scene) == held_out:
            break
    return scene if held_out or random.random() >= 0.1 else _with_fewer_words(random, scene)


def parse(caption: str) -> Scene:
    """Return the scene of a caption. Raises ValueError with the unknown words."""
    found = _CAPTION.fullmatch(caption.strip().lower())
    if found is None:
        known = {*COLOURS, *SHAPES, *SUBJECTS, CLASS, *_WORDS}
        unknown = [word for word in re.findall(r"\S+", caption.lower()) if word not in known]
        raise ValueError(f"{caption!r}: " + (f"{unknown[0]!r} is not of this world" if unknown else "not its grammar"))
    part = {name: value or "" for name, value in found.groupdict().items()}
    other = Thing(part["colour2"], part["shape2"], part["size2"], part["texture2"]) if part["relation"] else None
    thing = Thing(part["colour"], part["shape"], part["size"], part["texture"])
    return Scene(part["background"], thing, part["place"], part["relation"], other, part["style"])


def complete(scene: Scene, random: random.Random) -> Scene:
    """Return the scene with all open choices made, without creating a held-out combination."""
    if all(thing.colour and thing.shape != CLASS for thing in scene.things) and scene.background:
        return scene
    while True:
        background = scene.background or random.choice(_other_colours({thing.colour for thing in scene.things}))
        things = [
            replace(
                thing,
                colour=thing.colour or random.choice(_other_colours({background})),
                shape=random.choice(SHAPES) if thing.shape == CLASS else thing.shape,
            )
            for thing in scene.things
        ]
        chosen = replace(scene, background=background, thing=things[0], other=things[1] if scene.other else None)
        alike = len(things) == 2 and things[0] == things[1]
        if not alike and (is_held_out(scene) or not is_held_out(chosen)):
            return chosen


def render(scene: Scene, seed: int, side: int = 64) -> Image.Image:
    """Draw a scene, RGB, `side` pixels square; position, size, angle and colours vary a little with the seed.

    They do not depend on the style: with a seed, a scene is the same in all styles but for its surface.
    """
    chance = random.Random(f"{seed}/{replace(scene, style='').caption}")
    scene = complete(scene, chance)
    style = scene.style if scene.style in STYLED else ""
    placed = [
        Placed(
            FIGURES[thing.shape].outline,
            x + chance.uniform(-0.025, 0.025),
            y + chance.uniform(-0.025, 0.025),
            radius * chance.uniform(0.94, 1.06),
            chance.uniform(-8, 8),
            _varied(COLOURS[thing.colour], chance),
            thing.texture or FIGURES[thing.shape].texture,
            FIGURES[thing.shape].parts,
            style,
        )
        for thing, (x, y, radius) in zip(scene.things, _layout(scene), strict=True)
    ]
    picture = paint(placed, _varied(COLOURS[scene.background], chance), side)
    return pixelated(picture) if scene.style == "pixelated" else picture


def _layout(scene: Scene) -> Iterator[tuple[float, float, float]]:
    """Yield centre x, y and radius of each thing, as fractions of the side."""
    if scene.other is None:
        radius = _RADIUS[scene.thing.size]
        right, down = _PLACED_AT[scene.place]
        away = 0.5 - min(radius, 0.32)  # never quite up to the edge
        yield 0.5 + right * away * 0.85, 0.5 + down * away * 0.85, radius
        return
    right, down = _RELATED_AT[scene.relation]
    for sign in (0.5, -0.5):
        yield 0.5 + sign * right * _PAIR_DISTANCE, 0.5 + sign * down * _PAIR_DISTANCE, _PAIR_RADIUS


def _varied(colour: tuple[int, int, int], chance: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + chance.randint(-9, 9))) for channel in colour)
    return red, green, blue


def _plain(random: random.Random) -> Scene:
    background, colour = random.sample(list(COLOURS), 2)
    return Scene(background, Thing(colour, random.choice(SHAPES)))


def _rich(random: random.Random) -> Scene:
    scene = _plain(random)
    while True:
        size, texture, place = random.choice(SIZES), random.choice(TEXTURES), random.choice(PLACES)
        if (size or texture or place) and not (size == "large" and place):
            return replace(scene, thing=replace(scene.thing, size=size, texture=texture), place=place)


def _pair(random: random.Random) -> Scene:
    while True:
        scene = _plain(random)
        other = Thing(random.choice(_other_colours({scene.background})), random.choice(SHAPES))
        if other != scene.thing:
            return replace(scene, relation=random.choice(RELATIONS), other=other)


def _with_fewer_words(random: random.Random, scene: Scene) -> Scene:
    thing = replace(
        scene.thing,
        colour=random.choice((scene.thing.colour, "")),
        shape=random.choice((scene.thing.shape, CLASS)),
    )
    return replace(scene, thing=thing, background=random.choice((scene.background, "")))


def _other_colours(taken: set[str]) -> list[str]:
    return [colour for colour in COLOURS if colour not in taken]


def _article(word: str) -> str:
    return "an" if word[:1] in "aeiou" and word else "a"


def _one_of(name: str, words: tuple[str, ...], optional: bool = False) -> str:
    chosen = f"(?P<{name}>{'|'.join(word for word in words if word)})"
    return f"(?:{chosen} )?" if optional else chosen


def _thing(number: str) -> str:
    parts = (("size", SIZES), ("texture", TEXTURES), ("colour", tuple(COLOURS)))
    optional = "".join(_one_of(name + number, words, optional=True) for name, words in parts)
    return f"an? {optional}{_one_of('shape' + number, (*SHAPES, *SUBJECTS, CLASS))}"


_CAPTION = re.compile(
    _thing("")
    + f"(?: {_one_of('place', PLACES)})?"
    + f"(?: {_one_of('relation', RELATIONS)} {_thing('2')})?"
    + f"(?: on an? {_one_of('background', tuple(COLOURS))} background)?"
    + f"(?: in {_one_of('style', STYLES)} style)?"
)
_WORDS = {
    word
    for words in (SIZES, TEXTURES, PLACES, RELATIONS, STYLES, ("a an background in style",))
    for w in words
    for word in w.split()
}

"""A rule-based reader of pictures: what is in one, and whether that is what a caption asks for."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields

from PIL import Image

from sd3tune.nano.colours import Pixels, nearest_colour
from sd3tune.nano.patterns import look
from sd3tune.nano.segment import SIDE, Patch, ground, looked_at, patches
from sd3tune.nano.silhouettes import outlined
from sd3tune.nano.world import CLASS, Scene, Thing

_FITS, _LEADS = 0.87, 0.01  # a silhouette is of no shape that fits it less, or hardly better than another shape
_SMALL_BELOW, _LARGE_ABOVE = 0.24, 0.355  # radii, between the world's 0.19, 0.30 and 0.42
_TOO_LARGE = 0.55  # a radius at which a square fills the picture
_PLACED_FROM = 0.085  # off the middle: half as far as the world puts the largest thing that it puts anywhere


@dataclass(frozen=True)
class Seen:
    """A thing in the picture. Lengths are parts of the picture's side, from its upper left corner."""

    colour: str
    shape: str | None
    """None where nothing fits."""
    size: str
    texture: str
    x: float
    y: float
    radius: float
    fit: float
    """How well the best shape fits, 0 to 1."""


_NOTHING = Seen("", None, "", "", x=0.5, y=0.5, radius=0, fit=0)


@dataclass(frozen=True)
class Reading:
    """What is in a picture."""

    background: str
    things: tuple[Seen, ...]
    """The two largest at most, the larger first."""
    count: int
    """Of all things, specks left out."""


@dataclass(frozen=True)
class Verdict:
    """What of a scene a picture shows; None where the scene does not ask.

    No word about size or texture asks for nothing. `colour`, `shape`, `size` and `texture` are those of the first
    thing; `other` is whether the second is all that is asked of it.
    """

    count: bool
    background: bool | None
    colour: bool | None
    shape: bool | None
    size: bool | None
    texture: bool | None
    place: bool | None
    relation: bool | None
    other: bool | None

    @property
    def right(self) -> bool:
        """Whether the picture shows all that is asked for, and no further thing."""
        return self.score == 1

    @property
    def score(self) -> float:
        """The share of what is asked for that the picture shows."""
        asked = [answer for field in fields(self) if (answer := getattr(self, field.name)) is not None]
        return sum(asked) / len(asked)


def read(image: Image.Image) -> Reading:
    """What is in a picture; one of another size than 64 x 64 is scaled first."""
    pixels = looked_at(image)
    background = ground(pixels)
    found = patches(pixels, background)
    return Reading(nearest_colour(background), tuple(_seen(pixels, patch) for patch in found[:2]), len(found))


def judge(image: Image.Image, scene: Scene) -> Verdict:
    """Whether a picture shows a scene."""
    return judge_reading(read(image), scene)


def judge_reading(reading: Reading, scene: Scene) -> Verdict:
    """Whether what was read is the scene; of two things, each may be the one that is asked for first."""
    seen = [*reading.things, _NOTHING, _NOTHING][: len(scene.things)]
    verdicts = (_verdict(reading, scene, order) for order in itertools.permutations(seen))
    return max(verdicts, key=lambda verdict: verdict.score)


def _verdict(reading: Reading, scene: Scene, order: tuple[Seen, ...]) -> Verdict:
    thing, first, second = scene.thing, order[0], order[-1]
    alone = scene.other is None  # of two, each is drawn small, and the relation places them
    return Verdict(
        count=reading.count == len(scene.things),
        background=_answer(scene.background, reading.background),
        colour=_answer(thing.colour, first.colour),
        shape=_has_shape(thing, first),
        size=_answer(thing.size, first.size) if alone else None,
        texture=_answer(thing.texture, first.texture),
        place=_answer(scene.place, _place(first)) if alone else None,
        relation=_answer(scene.relation, _relation(first, second)),
        other=None if scene.other is None else _is(scene.other, second),
    )


def _answer(asked: str, seen: str) -> bool | None:
    return asked == seen if asked else None


def _has_shape(thing: Thing, seen: Seen) -> bool:
    return seen.shape is not None and thing.shape in (CLASS, seen.shape)


def _is(thing: Thing, seen: Seen) -> bool:
    answers = (_answer(thing.colour, seen.colour), _answer(thing.texture, seen.texture), _has_shape(thing, seen))
    return False not in answers


def _seen(pixels: Pixels, patch: Patch) -> Seen:
    form = outlined(patch.cover)
    outer = look(pixels, patch.core, form.x, form.y)
    radius = form.radius / SIDE
    return Seen(
        colour=outer.colour,
        shape=form.shape if form.fit >= _FITS and form.lead >= _LEADS and radius < _TOO_LARGE else None,
        size="small" if radius < _SMALL_BELOW else "large" if radius > _LARGE_ABOVE else "",
        texture=outer.texture,
        x=(form.x + 0.5) / SIDE,
        y=(form.y + 0.5) / SIDE,
        radius=radius,
        fit=form.fit,
    )


def _place(seen: Seen) -> str:
    right, down = seen.x - 0.5, seen.y - 0.5
    if math.hypot(right, down) < _PLACED_FROM:
        return ""
    if abs(right) > abs(down):
        return "on the right" if right > 0 else "on the left"
    return "at the bottom" if down > 0 else "at the top"


def _relation(first: Seen, second: Seen) -> str:
    """Where the first is, seen from the second."""
    if _NOTHING in (first, second):
        return ""
    right, down = first.x - second.x, first.y - second.y
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"

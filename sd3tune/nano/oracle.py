"""The oracle: a rule-based reader that finds the things in a picture and compares them with a caption."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from PIL import Image

from sd3tune.nano.colours import Pixels, nearest_colour
from sd3tune.nano.patterns import look
from sd3tune.nano.segment import SIDE, Patch, ground, looked_at, patches
from sd3tune.nano.silhouettes import Outlined, outlined
from sd3tune.nano.surfaces import is_pixelated, surface
from sd3tune.nano.world import CLASS, PLACES, RELATIONS, SHAPES, SUBJECT, SUBJECTS, Scene, Thing

_FITS = 0.85  # least fit of a shape to its silhouette
_CLEARLY = 1.2  # least ratio of the misfits of the second-best and best shape
_SMALL_BELOW, _LARGE_ABOVE = 0.24, 0.355  # radii between the world's 0.19, 0.30 and 0.42
_TOO_LARGE = 0.55  # a square of this radius fills the picture
_KNOWN, _ALL = (*SHAPES, SUBJECT), (*SHAPES, *SUBJECTS)
_PLACED_FROM = 0.085  # distance from the middle: half of that of the world's largest placed thing


@dataclass(frozen=True)
class Seen:
    """A thing in the picture. Lengths are fractions of the picture's side, from its upper left corner."""

    colour: str
    shape: str | None
    """The best shape; None if no shape fits."""
    size: str
    texture: str
    x: float
    y: float
    radius: float
    fit: float
    """The fit of the best shape, 0 to 1."""
    style: str = ""
    """One of STYLES."""

    @property
    def place(self) -> str:
        """One of PLACES; "" is the middle."""
        right, down = self.x - 0.5, self.y - 0.5
        return _direction(right, down, PLACES[1:]) if math.hypot(right, down) > _PLACED_FROM else ""


_NOTHING = Seen("", None, "", "", x=0.5, y=0.5, radius=0, fit=0)


@dataclass(frozen=True)
class Reading:
    """The things in a picture."""

    background: str
    things: tuple[Seen, ...]
    """At most the two largest, the larger first."""
    count: int
    """The number of things, without specks."""


@dataclass(frozen=True)
class Verdict:
    """The parts of a scene that a picture shows; None for parts that the scene leaves open.

    A scene without a word for size or texture leaves it open. `colour`, `shape`, `size` and `texture` are for
    the first thing; `other` is True if the second matches in all of them, and `style` is for all things.
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
    style: bool | None = None

    @property
    def right(self) -> bool:
        """True if the picture shows all of the scene, and nothing else."""
        return self.score == 1

    @property
    def score(self) -> float:
        """The share of the scene's parts that the picture shows."""
        asked = [answer for field in fields(self) if (answer := getattr(self, field.name)) is not None]
        return sum(asked) / len(asked)


def read(image: Image.Image, everything: bool = False) -> Reading:
    """Find the things in a picture; a picture of another size than 64 x 64 is scaled first.

    Without `everything`, the heart is the only known subject, and styles are not read.
    """
    pixels = looked_at(image)
    background = ground(pixels)
    found = patches(pixels, background)
    if everything:
        forms = [(patch, outlined(patch.cover, _ALL)) for patch in found[:2]]
        blocks = bool(forms) and is_pixelated(image, pixels, background, *forms[0])
        things = tuple(_seen_among_all(pixels, background, patch, form, blocks) for patch, form in forms)
    else:
        things = tuple(_seen(pixels, patch) for patch in found[:2])
    return Reading(nearest_colour(background), things, len(found))


def judge(image: Image.Image, scene: Scene) -> Verdict:
    """Compare a picture with a scene. The heart is the only known subject, unless the scene has a style or another."""
    return judge_reading(read(image, needs_everything(scene)), scene)


def needs_everything(scene: Scene) -> bool:
    """Return True if the scene has a style, or a subject other than the heart."""
    return bool(scene.style) or any(thing.shape in SUBJECTS and thing.shape != SUBJECT for thing in scene.things)


def judge_reading(reading: Reading, scene: Scene) -> Verdict:
    """Compare a reading with a scene; either of two things may be the first of the scene."""
    seen = [*reading.things, _NOTHING, _NOTHING][: len(scene.things)]
    verdicts = (_verdict(reading, scene, order) for order in itertools.permutations(seen))
    return max(verdicts, key=lambda verdict: verdict.score)


def _verdict(reading: Reading, scene: Scene, order: tuple[Seen, ...]) -> Verdict:
    thing, first, second = scene.thing, order[0], order[-1]
    alone = scene.other is None  # two things are both small, and placed by their relation
    return Verdict(
        count=reading.count == len(scene.things),
        background=_answer(scene.background, reading.background),
        colour=_answer(thing.colour, first.colour),
        shape=_has_shape(thing, first),
        size=_answer(thing.size, first.size) if alone else None,
        texture=_answer(thing.texture, first.texture),
        place=_answer(scene.place, first.place) if alone else None,
        relation=_answer(scene.relation, _relation(first, second)),
        other=None if scene.other is None else _is(scene.other, second),
        style=_answer(scene.style, first.style if first.style == second.style else ""),
    )


def _answer(asked: str, seen: str) -> bool | None:
    return asked == seen if asked else None


def _has_shape(thing: Thing, seen: Seen) -> bool:
    return seen.shape is not None and thing.shape in (CLASS, seen.shape)


def _is(thing: Thing, seen: Seen) -> bool:
    answers = (_answer(thing.colour, seen.colour), _answer(thing.texture, seen.texture), _has_shape(thing, seen))
    return False not in answers


def _seen(pixels: Pixels, patch: Patch) -> Seen:
    form = outlined(patch.cover, _KNOWN)
    outer = look(pixels, patch.core, form.x, form.y)
    return _as_seen(form, outer.colour, outer.texture, shown=_is_clear(form))


def _seen_among_all(pixels: Pixels, background: Pixels, patch: Patch, form: Outlined, blocks: bool) -> Seen:
    inside = surface(pixels, background, patch, form, blocks)
    if inside is None:
        outer = look(pixels, patch.core, form.x, form.y)
        return _as_seen(form, outer.colour, outer.texture, shown=False)
    return _as_seen(form, inside.colour, inside.texture, shown=_is_clear(form), style=inside.style)


def _as_seen(form: Outlined, colour: str, texture: str, shown: bool, style: str = "") -> Seen:
    radius = form.radius / SIDE
    return Seen(
        colour=colour,
        shape=form.shape if shown and radius < _TOO_LARGE else None,
        size="small" if radius < _SMALL_BELOW else "large" if radius > _LARGE_ABOVE else "",
        texture=texture,
        x=(form.x + 0.5) / SIDE,
        y=(form.y + 0.5) / SIDE,
        radius=radius,
        fit=form.fit,
        style=style,
    )


def _is_clear(form: Outlined) -> bool:
    return form.fit >= _FITS and 1 - form.next_fit >= _CLEARLY * (1 - form.fit)


def _relation(first: Seen, second: Seen) -> str:
    """Return the position of the first relative to the second."""
    if _NOTHING in (first, second):
        return ""
    return _direction(first.x - second.x, first.y - second.y, RELATIONS)


def _direction(right: float, down: float, names: Sequence[str]) -> str:
    """Return the direction's name; `names` are for left, right, up and down."""
    if abs(right) > abs(down):
        return names[1] if right > 0 else names[0]
    return names[3] if down > 0 else names[2]

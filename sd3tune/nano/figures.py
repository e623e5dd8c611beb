"""The forms that the world's nouns stand for: outlines, and for some subjects a second part or a texture of their own.

All coordinates are in the unit circle, y down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sd3tune.nano.shapes import OUTLINES, Outline

_Point = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """A form without colour."""

    outline: Outline
    parts: Outline = ()
    """Polygons inside the outline in the thing's second tone."""
    texture: str = ""
    """The texture of a thing whose caption names none."""


def _curve(at: Callable[[float], _Point], start: float, end: float, corners: int = 48) -> list[_Point]:
    """Return points of a curve for angles from `start` to `end` degrees, both included."""
    return [at(math.radians(start + (end - start) * n / (corners - 1))) for n in range(corners)]


def _arc(x: float, y: float, across: float, down: float, start: float = 0, end: float = 360) -> list[_Point]:
    """Return an arc of an ellipse; 0 degrees point right, 90 down."""
    return _curve(lambda angle: (x + across * math.cos(angle), y + down * math.sin(angle)), start, end)


def _moon() -> list[_Point]:
    """Return a crescent: a disc of radius 0.95 without one of radius 0.78, whose centre lies 0.42 to the right."""
    outer, inner, apart = 0.95, 0.78, 0.42
    meet = (outer**2 - inner**2 + apart**2) / (2 * apart)
    wide = math.degrees(math.acos(meet / outer))
    narrow = math.degrees(math.acos((meet - apart) / inner))
    back = _arc(apart, 0, inner, inner, 360 - narrow, narrow)
    return [(x + 0.2, y) for x, y in _arc(0, 0, outer, outer, wide, 360 - wide) + back]


def _leaf() -> list[_Point]:
    """Return a lens between two parabolas, its points at the upper right and the lower left."""
    steps = [n / 24 - 1 for n in range(48)]
    along = [(t, 0.5 * (1 - t * t)) for t in steps] + [(-t, -0.5 * (1 - t * t)) for t in steps]
    return [((t + side) / math.sqrt(2), (side - t) / math.sqrt(2)) for t, side in along]


def _flower(petals: int = 6) -> list[_Point]:
    def at(angle: float) -> _Point:
        radius = 0.72 + 0.26 * math.cos(petals * angle)
        return radius * math.cos(angle), radius * math.sin(angle)

    return _curve(at, 0, 360, 120)


_ROOF = [(0, -0.95), (0.98, -0.08), (-0.98, -0.08)]
_HULL = [(-0.98, 0.28), (0.98, 0.28), (0.62, 0.85), (-0.62, 0.85)]
_TAIL = [(-0.42, 0), (-0.95, -0.62), (-0.95, 0.62)]

FIGURES: dict[str, Figure] = {
    **{name: Figure(outline) for name, outline in OUTLINES.items()},
    "moon": Figure([_moon()]),
    "arrow": Figure(
        [[(-0.95, -0.25), (0.05, -0.25), (0.05, -0.8), (0.98, 0), (0.05, 0.8), (0.05, 0.25), (-0.95, 0.25)]]
    ),
    "bolt": Figure([[(-0.15, -1), (0.5, -1), (0.2, -0.32), (0.66, -0.32), (-0.35, 1), (-0.06, 0.14), (-0.55, 0.14)]]),
    "crown": Figure([[(-0.92, 0.7), (-0.92, -0.7), (-0.46, 0), (0, -0.85), (0.46, 0), (0.92, -0.7), (0.92, 0.7)]]),
    "leaf": Figure([_leaf()]),
    "house": Figure(
        [[(0, -0.95), (0.98, -0.08), (0.7, -0.08), (0.7, 0.85), (-0.7, 0.85), (-0.7, -0.08), (-0.98, -0.08)]], [_ROOF]
    ),
    "tree": Figure(
        [[*_arc(0, -0.28, 0.7, 0.7, 109, 431), (0.24, 0.98), (-0.24, 0.98)]],
        [[(-0.24, 0.3), (0.24, 0.3), (0.24, 0.98), (-0.24, 0.98)]],
    ),
    "fish": Figure([[*_arc(0.22, 0, 0.75, 0.56, 200, 520), (-0.95, 0.62), (-0.95, -0.62)]], [_TAIL]),
    "flower": Figure([_flower()], [_arc(0, 0, 0.36, 0.36)]),
    "boat": Figure([[(-0.2, -0.98), (0.74, 0.28), *_HULL[1:], _HULL[0], (-0.2, 0.28)]], [_HULL]),
    "cat": Figure(
        [[(-0.78, -0.95), (-0.28, -0.52), (0.28, -0.52), (0.78, -0.95), *_arc(0, 0.15, 0.85, 0.75, -15, 195)]],
        [_arc(0, 0.48, 0.42, 0.3), _arc(-0.36, -0.08, 0.17, 0.17), _arc(0.36, -0.08, 0.17, 0.17)],
    ),
    "monster": Figure(
        [
            [
                *[(-0.8, -0.4), (-0.75, -0.98), (-0.28, -0.6), (0.28, -0.6), (0.75, -0.98), (0.8, -0.4)],
                *[(0.8, 0.95), (0.24, 0.95), (0.24, 0.62), (-0.24, 0.62), (-0.24, 0.95), (-0.8, 0.95)],
            ]
        ],
        texture="striped",
    ),
}
"""Noun -> its form."""

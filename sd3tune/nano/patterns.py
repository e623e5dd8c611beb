"""Whether a thing is striped or dotted, and which colour it has between the stripes or dots."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd3tune.nano.colours import Pixels, median, nearest_colour, oklab
from sd3tune.nano.segment import SIDE, Mask
from sd3tune.nano.shapes import second_tone
from sd3tune.nano.world import COLOURS

# As drawn, in pixels of a picture of 64.
_STRIPE, _DOTS_APART, _DOT_RADIUS = 0.075 * SIDE, 0.16 * SIDE, 0.047 * SIDE
_SHIFTS = (-1.5, 0.0, 1.5)  # pixels, by which a pattern may be off the thing's middle
_FOLLOWS = 0.65  # correlation of brightness and pattern
_TONES_APART = 40.0  # of 442; second tones are 90 apart and more


@dataclass(frozen=True)
class Look:
    colour: str
    texture: str


def look(pixels: Pixels, core: Mask, x: float, y: float) -> Look:
    """Colour and texture of the thing whose inner pixels are `core` and whose middle is at (x, y)."""
    inner = pixels[core]
    rows, columns = np.nonzero(core)
    drawn = list(_patterns(columns - x, rows - y))
    follows = [abs(_correlation(inner.max(axis=-1), pattern)) for _, pattern in drawn]
    best = int(np.argmax(follows))
    texture, pattern = drawn[best]
    if follows[best] > _FOLLOWS:
        tones = median(inner[pattern < 0.5]), median(inner[pattern >= 0.5])
        if np.linalg.norm(tones[0] - tones[1]) > _TONES_APART:
            return Look(_base(*tones), texture)
    return Look(nearest_colour(median(inner)), "")


def _base(*tones: Pixels) -> str:
    """The colour of a thing that has these two tones, in either order."""
    dark, light = sorted(oklab(np.stack(tones)), key=lambda tone: float(tone[0]))
    drawn = {name: oklab(np.array([colour, second_tone(colour)], np.float32)) for name, colour in COLOURS.items()}

    def apart(name: str) -> float:
        darker, lighter = sorted(drawn[name], key=lambda tone: float(tone[0]))
        return float(np.linalg.norm(dark - darker) + np.linalg.norm(light - lighter))

    return min(drawn, key=apart)


def _patterns(across: NDArray[np.float64], down: NDArray[np.float64]) -> Iterator[tuple[str, Pixels]]:
    """How much of each pixel, given from the thing's middle, a stripe or dot would cover."""
    for off in _SHIFTS:
        yield "striped", _soft(_STRIPE / 2 - _from_nearest(down + off - _STRIPE, 2 * _STRIPE))
    for right, below in itertools.product(_SHIFTS, repeat=2):
        away = np.hypot(_from_nearest(across + right, _DOTS_APART), _from_nearest(down + below, _DOTS_APART))
        yield "dotted", _soft(_DOT_RADIUS - away)


def _from_nearest(at: NDArray[np.float64], apart: float) -> NDArray[np.float64]:
    """The distance to the nearest multiple of `apart`."""
    return np.abs(at - apart * np.round(at / apart))


def _soft(inside: NDArray[np.float64]) -> Pixels:
    return np.clip(inside + 0.5, 0, 1).astype(np.float32)


def _correlation(first: Pixels, second: Pixels) -> float:
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second / max(np.sqrt((first @ first) * (second @ second)), 1e-6))

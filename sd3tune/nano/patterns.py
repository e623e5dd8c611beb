"""Recognise stripes and dots, and the colour between them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from sd3tune.nano.colours import Pixels, median, nearest_colour, oklab
from sd3tune.nano.segment import SIDE, Mask
from sd3tune.nano.shapes import second_tone
from sd3tune.nano.world import COLOURS

# As drawn, in pixels.
_STRIPE, _DOTS_APART, _DOT_RADIUS = 0.075 * SIDE, 0.16 * SIDE, 0.047 * SIDE
_SHIFTS = np.array(
    [[-1.5], [0.0], [1.5]], np.float32
)  # possible offsets of a pattern from the thing's middle, in pixels
_FOLLOWS = 0.65  # least correlation of brightness and pattern
_TONES_APART = 18.0  # of 442; second tones are drawn at least 90 apart, which a VAE may reduce


@dataclass(frozen=True)
class Look:
    """A thing's surface."""

    colour: str
    texture: str


def look(pixels: Pixels, core: Mask, x: float, y: float) -> Look:
    """Return colour and texture of the thing with the inner pixels `core` and the middle (x, y)."""
    inner = pixels[core]
    rows, columns = np.nonzero(core)
    stripes, dots = _patterns((columns - x).astype(np.float32), (rows - y).astype(np.float32))
    patterns = np.concatenate([stripes, dots])
    follows = np.abs(_correlations(patterns, inner.max(axis=-1)))
    best = int(follows.argmax())
    if follows[best] > _FOLLOWS:
        second = patterns[best] > (patterns[best].min() + patterns[best].max()) / 2
        tones = np.stack([median(inner[~second]), median(inner[second])])
        if np.linalg.norm(tones[0] - tones[1]) > _TONES_APART:
            return Look(base_colour(tones), "striped" if best < len(stripes) else "dotted")
    return Look(nearest_colour(median(inner)), "")


def base_colour(tones: Pixels) -> str:
    """Return the colour of a thing with these two tones (2, 3), in either order."""
    names, drawn = _drawn_tones()
    return names[int(np.linalg.norm(drawn - _dark_first(oklab(tones)), axis=-1).sum(axis=-1).argmin())]


@functools.cache
def _drawn_tones() -> tuple[list[str], Pixels]:
    """Return the names of all colours, and the two tones of each in Oklab: (colours, 2, 3)."""
    tones = np.array([[colour, second_tone(colour)] for colour in COLOURS.values()], np.float32)
    return list(COLOURS), np.stack([_dark_first(pair) for pair in oklab(tones)])


def _dark_first(tones: Pixels) -> Pixels:
    return tones[tones[:, 0].argsort()]


def _patterns(across: Pixels, down: Pixels) -> tuple[Pixels, Pixels]:
    """Return the coverage of each pixel (n), relative to the thing's centre, by stripes (3, n) and dots (9, n)."""
    stripes = _STRIPE / 2 - _from_nearest(down + _SHIFTS - _STRIPE, 2 * _STRIPE)
    right, below = _from_nearest(across + _SHIFTS, _DOTS_APART), _from_nearest(down + _SHIFTS, _DOTS_APART)
    dots = _DOT_RADIUS - np.hypot(right[:, None], below).reshape(-1, len(across))
    return _soft(stripes), _soft(dots)


def _from_nearest(at: Pixels, apart: float) -> Pixels:
    """Return the distance of `at` to the nearest multiple of `apart`."""
    offset: Pixels = at - apart * np.round(at / apart)
    return np.abs(offset)


def _soft(inside: Pixels) -> Pixels:
    return np.clip(inside + 0.5, 0, 1)


def _correlations(patterns: Pixels, values: Pixels) -> Pixels:
    """Return Pearson's correlation of each pattern (patterns, n) with the values (n); 0 if either is constant."""
    patterns, values = patterns - patterns.mean(axis=1, keepdims=True), values - values.mean()
    lengths = np.linalg.norm(patterns, axis=1) * np.linalg.norm(values)
    correlations: Pixels = patterns @ values / np.maximum(lengths, 1e-6)
    return correlations

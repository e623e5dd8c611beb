"""Recognise a patch's shape by comparing its silhouette with all shapes at many angles."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFilter

from sd3tune.nano.figures import FIGURES
from sd3tune.nano.segment import sharpened
from sd3tune.nano.shapes import Placed, paint

Grid = NDArray[np.floating[Any]]

_POINTS = 36  # per side of the grid on which silhouettes are compared
_REACH = 2.3  # half side of the grid in root mean square radii; the points of a star lie at 2.1
_TURN = 5  # degrees between drawn silhouettes
_TURNS = {"circle": _TURN, "ring": _TURN, "square": 90, "cross": 90, "star": 72, "triangle": 120}
_SUBJECT_TURN = 50
"""Ranges of angles in degrees, half to either side: the shape's symmetry, but less for subjects, as a rotated heart
fits many blots."""
_SOFTNESS = (0.05, 0.13)  # of edges, in radii: of a large thing as drawn, and of a small one decoded by a VAE
_DRAWN_SIDE, _DRAWN_RADIUS = 96, 0.4


@dataclass(frozen=True)
class Outlined:
    """The shape that fits a silhouette best; lengths are pixels."""

    shape: str
    fit: float
    """Tanimoto overlap with that shape: 1 is equal, 0 disjoint."""
    next_fit: float
    """The fit of the second-best shape."""
    x: float
    y: float
    radius: float
    angle: float
    """Degrees from upright."""


@dataclass(frozen=True)
class _Frame:
    """The position of a silhouette: its centre of mass and root mean square radius."""

    x: float
    y: float
    spread: float


def outlined(cover: Grid, among: tuple[str, ...]) -> Outlined:
    """Return the best of some figures for a silhouette (height, width) with values from 0 to 1, not all 0."""
    frame = _frame(cover)
    drawn = _drawn(among)
    seen = _on_grid(cover, frame)
    shared = drawn.grids @ seen
    fits = shared / (drawn.sizes + seen @ seen - shared)
    best = int(fits.argmax())
    shape, fit = str(drawn.shapes[best]), float(fits[best])
    next_fit = float(fits[drawn.shapes != shape].max())
    x, y, radius = (float(length) * frame.spread for length in drawn.lies[best])
    return Outlined(shape, fit, next_fit, frame.x + x, frame.y + y, radius, float(drawn.angles[best]))


@dataclass(frozen=True)
class _Drawn:
    """The silhouettes of all shapes at many angles; lengths are in root mean square radii."""

    shapes: NDArray[np.str_]
    angles: NDArray[np.int_]
    grids: Grid
    """(silhouettes, points)"""
    sizes: Grid
    lies: Grid
    """(silhouettes, 3): the outline's origin, x and y from the centre of mass, and its radius."""


@functools.cache
def _drawn(among: tuple[str, ...]) -> _Drawn:
    shapes, angles, grids, lies = [], [], [], []
    middle, radius = 0.5 * _DRAWN_SIDE - 0.5, _DRAWN_RADIUS * _DRAWN_SIDE
    for (shape, angle), softness in itertools.product(_directions(among), _SOFTNESS):
        placed = Placed(FIGURES[shape].outline, 0.5, 0.5, _DRAWN_RADIUS, angle, (255, 255, 255))
        picture = paint([placed], (0, 0, 0), _DRAWN_SIDE).getchannel(0)
        blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(softness * radius)), np.float32) / 255
        cover = sharpened(blurred)
        frame = _frame(cover)
        shapes.append(shape)
        angles.append(angle)
        grids.append(_on_grid(cover, frame))
        lies.append(np.array([middle - frame.x, middle - frame.y, radius]) / frame.spread)
    stacked = np.stack(grids)
    return _Drawn(np.array(shapes), np.array(angles), stacked, (stacked**2).sum(axis=1), np.array(lies, np.float32))


def _directions(among: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield (shape, angle) for angles around upright.

    Elsewhere, an almost equilateral triangle could have its origin below or beside the middle.
    """
    for shape in among:
        turn = _TURNS.get(shape, _SUBJECT_TURN)
        for angle in range(-turn // 2, turn // 2, _TURN):
            yield shape, angle


def _frame(cover: Grid) -> _Frame:
    total = float(cover.sum())
    rows, columns = np.arange(cover.shape[0]), np.arange(cover.shape[1])
    down, across = cover.sum(axis=1) / total, cover.sum(axis=0) / total
    x, y = float(across @ columns), float(down @ rows)
    return _Frame(x, y, math.sqrt(float(across @ (columns - x) ** 2 + down @ (rows - y) ** 2)))


def _on_grid(cover: Grid, frame: _Frame) -> Grid:
    """Return the silhouette, moved and scaled to the grid by linear interpolation: (points,)."""
    steps = np.linspace(-_REACH, _REACH, _POINTS) * frame.spread
    grid: Grid = _weights(frame.y + steps, cover.shape[0]) @ cover @ _weights(frame.x + steps, cover.shape[1]).T
    return grid.ravel()


def _weights(at: Grid, length: int) -> Grid:
    """Return the weight of each pixel at each point, (points, length); 0 outside."""
    return np.clip(1 - np.abs(at[:, None] - np.arange(length)), 0, 1).astype(np.float32)

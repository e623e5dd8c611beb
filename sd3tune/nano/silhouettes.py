"""Which shape a patch has: its silhouette beside those of all shapes in all directions."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from PIL import ImageFilter

from sd3tune.nano.shapes import OUTLINES, Placed, paint

Grid = NDArray[np.float32]

_POINTS = 36  # along each side of the grid on which silhouettes are compared
_REACH = 2.3  # of the grid from its middle, in root mean square radii: a star's points lie at 2.1
_TURN = 5  # degrees from one drawn silhouette to the next
_SYMMETRY = {"circle": _TURN, "ring": _TURN, "square": 90, "cross": 90, "star": 72, "triangle": 120, "heart": 360}
_SOFTNESS = (0.05, 0.13)  # of the edges, in radii: a large thing as drawn, a small one as a VAE decodes it
_DRAWN_SIDE, _DRAWN_RADIUS = 96, 0.4


@dataclass(frozen=True)
class Outlined:
    """The shape that fits a silhouette best; lengths are pixels."""

    shape: str
    fit: float
    """Overlap with that shape (Tanimoto's): 1 is equal, 0 disjoint."""
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class _Frame:
    """Where a silhouette lies: its centre of mass and root mean square radius."""

    x: float
    y: float
    spread: float


def outlined(cover: Grid) -> Outlined:
    """The shape of a silhouette (height, width) of values from 0 to 1, not all 0."""
    frame = _frame(cover)
    drawn = _drawn()
    seen = _on_grid(cover, frame)
    shared = drawn.grids @ seen
    fits = shared / (drawn.sizes + seen @ seen - shared)
    best = int(fits.argmax())
    right, down = drawn.middles[best] * frame.spread
    return Outlined(
        drawn.shapes[best], float(fits[best]), frame.x + right, frame.y + down, drawn.radii[best] * frame.spread
    )


@dataclass(frozen=True)
class _Drawn:
    """Every shape in every direction; lengths are root mean square radii."""

    shapes: list[str]
    grids: Grid
    """(silhouettes, points)"""
    sizes: Grid
    middles: Grid
    """(silhouettes, 2): the outline's origin, seen from the centre of mass."""
    radii: list[float]


@functools.cache
def _drawn() -> _Drawn:
    shapes, grids, middles, radii = [], [], [], []
    for (shape, angle), softness in itertools.product(_directions(), _SOFTNESS):
        middle, radius = 0.5, _DRAWN_RADIUS
        placed = Placed(OUTLINES[shape], middle, middle, radius, angle, (255, 255, 255))
        drawn = paint([placed], (0, 0, 0), _DRAWN_SIDE).getchannel(0).filter(ImageFilter.GaussianBlur(softness * radius * _DRAWN_SIDE))
        cover = np.clip(np.asarray(drawn, np.float32) / 255 * 2 - 0.5, 0, 1)
        frame = _frame(cover)
        shapes.append(shape)
        grids.append(_on_grid(cover, frame))
        at = middle * _DRAWN_SIDE - 0.5
        middles.append(((at - frame.x) / frame.spread, (at - frame.y) / frame.spread))
        radii.append(radius * _DRAWN_SIDE / frame.spread)
    stacked = np.stack(grids)
    return _Drawn(shapes, stacked, (stacked**2).sum(axis=1), np.array(middles, np.float32), radii)


def _directions() -> Iterator[tuple[str, int]]:
    """Those next to upright: an almost equilateral triangle has its origin below or beside the middle."""
    for shape, symmetry in _SYMMETRY.items():
        for angle in range(-symmetry // 2, symmetry // 2, _TURN):
            yield shape, angle


def _frame(cover: Grid) -> _Frame:
    total = float(cover.sum())
    rows, columns = np.arange(cover.shape[0]), np.arange(cover.shape[1])
    down, across = cover.sum(axis=1) / total, cover.sum(axis=0) / total
    x, y = float(across @ columns), float(down @ rows)
    return _Frame(x, y, math.sqrt(float(across @ (columns - x) ** 2 + down @ (rows - y) ** 2)))


def _on_grid(cover: Grid, frame: _Frame) -> Grid:
    """The silhouette, moved and scaled to the grid by linear interpolation: (points,)."""
    steps = np.linspace(-_REACH, _REACH, _POINTS) * frame.spread
    grid = _weights(frame.y + steps, cover.shape[0]) @ cover @ _weights(frame.x + steps, cover.shape[1]).T
    return grid.astype(np.float32).ravel()


def _weights(at: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """(points, length): how much each pixel counts at each point; none outside."""
    return np.clip(1 - np.abs(at[:, None] - np.arange(length)), 0, 1)

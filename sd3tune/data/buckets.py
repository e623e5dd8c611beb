"""Aspect buckets: the few shapes that images are cropped to, so that all images of a batch have one shape.

Sizes are (height, width) in pixels; their names are `width x height`, the usual notation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

Size = tuple[int, int]

STEP = 16  # 8 pixels per latent, 2 latents per patch side
_REFERENCE = 1024
_SIDES = ((1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1472, 704))
"""Long and short side of the buckets at 1024 px, after SDXL's."""


def bucket_table(resolution: int, largest: int | None = None) -> list[Size]:
    """Return the buckets at `resolution`: the square first, then each shape in landscape and portrait.

    Both sides are multiples of 16, and no bucket has more pixels than the square, so memory and time are at most the
    square's. Shapes that coincide at low resolutions are listed once. Shapes with a side above `largest` are left out.
    """
    table: list[Size] = []
    for reference_sides in _SIDES:
        long, short = (_nearest_multiple(side * resolution, _REFERENCE) for side in reference_sides)
        if long * short > resolution**2:
            short -= STEP
        if short and (largest is None or long <= largest):
            table += [(short, long), (long, short)]
    return list(dict.fromkeys(table))


def nearest_bucket(size: Size, table: Sequence[Size]) -> Size:
    """Return the bucket with the nearest aspect ratio on a logarithmic scale; the first of equally near ones."""
    return _nearest(size, tuple(table))


@functools.lru_cache(maxsize=4096)  # images of a large set have few sizes
def _nearest(size: Size, table: tuple[Size, ...]) -> Size:
    return min(table, key=lambda bucket: abs(_log_aspect(bucket) - _log_aspect(size)))


def size_name(size: Size) -> str:
    """Return `1152x896` for (896, 1152)."""
    return f"{size[1]}x{size[0]}"


def _nearest_multiple(numerator: int, denominator: int) -> int:
    """Return the multiple of 16 nearest to a fraction, at least one; halves go up."""
    return max(1, (2 * numerator + STEP * denominator) // (2 * STEP * denominator)) * STEP


def _log_aspect(size: Size) -> float:
    return math.log(size[1] / size[0])

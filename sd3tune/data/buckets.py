"""Aspect buckets: the few shapes that images are cut to, so that all images of a batch have one shape.

Sizes are (height, width) in pixels; their names are `width x height`, as people write it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Size = tuple[int, int]

STEP = 16  # 8 pixels a latent, 2 x 2 latents a patch
_REFERENCE = 1024
_SIDES = ((1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1472, 704))
"""Long and short side of the buckets at 1024 px, after SDXL's."""


def bucket_table(resolution: int, largest: int | None = None) -> list[Size]:
    """The buckets at `resolution`, the square first, then each shape lying and standing.

    Both sides are multiples of 16, and no bucket has more pixels than the square, so memory and time are at most the
    square's. At low resolutions shapes coincide and are listed once. Those with a side above `largest` are left out.
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
    """The bucket whose aspect ratio is nearest on a logarithmic scale; of equally near ones the first."""
    return min(table, key=lambda bucket: abs(_log_aspect(bucket) - _log_aspect(size)))


def size_name(size: Size) -> str:
    """`1152x896` for 896 rows of 1152 pixels."""
    return f"{size[1]}x{size[0]}"


def _nearest_multiple(numerator: int, denominator: int) -> int:
    """The multiple of 16 nearest to a fraction, at least one; halves go up."""
    return max(1, (2 * numerator + STEP * denominator) // (2 * STEP * denominator)) * STEP


def _log_aspect(size: Size) -> float:
    return math.log(size[1] / size[0])

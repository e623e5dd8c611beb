"""`resolution`: the sizes of training images, and their shares."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

from sd3tune.config.sections.key import WRITTEN
from sd3tune.config.sections.section import Section


def _multiple_of_16(side: int) -> int:
    if side % 16:
        low = side // 16 * 16
        raise ValueError(f"must be a multiple of 16 (8x VAE, 2x2 patches); {low} or {low + 16} would do")
    return side


Side = Annotated[int, Field(ge=16, le=4096), AfterValidator(_multiple_of_16)]


class SizeConfig(Section):
    """A size with a share of its own."""

    size: Annotated[Side, WRITTEN] = Field(description="Side of the square training crop in pixels.")
    share: Annotated[int, WRITTEN] = Field(
        1, ge=1, description="Number of times each image is used in this size per epoch."
    )


Sizes: TypeAlias = Side | Annotated[list[Side | SizeConfig], Field(min_length=1)]


def each_once(sizes: Sizes | None) -> Sizes | None:
    """Return the sizes. Raises ValueError for a size that is listed twice."""
    sides = [] if sizes is None else [side for side, _ in shares_of(sizes)]
    if twice := next((side for side in sides if sides.count(side) > 1), None):
        raise ValueError(f"has {twice} more than once; give it a share: {{size: {twice}, share: 2}}")
    return sizes


def shares_of(sizes: Sizes) -> list[tuple[int, int]]:
    """Return (side of the square in pixels, share) of each size, as written."""
    entries = sizes if isinstance(sizes, list) else [sizes]
    return [(one, 1) if isinstance(one, int) else (one.size, one.share) for one in entries]

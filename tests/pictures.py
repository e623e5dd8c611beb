"""Comparing pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageChops


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def distance(one: Image.Image | Path, other: Image.Image | Path) -> int:
    """The largest difference of two pictures of one size, in levels of 0 to 255."""
    first, second = (opened(picture) if isinstance(picture, Path) else picture for picture in (one, other))
    assert first.size == second.size
    return max(high for _, high in ImageChops.difference(first.convert("RGB"), second.convert("RGB")).getextrema())

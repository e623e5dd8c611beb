"""Pictures inside a page: small copies as data URIs, up to a limit on their size."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, features

from sd3tune.data.images import open_image
from sd3tune.errors import DataError

SIDE, THUMBNAIL = 512, 160
"""Longest sides of a preview and of a photo, in pixels."""
PICTURE_BYTES = 12 * 2**20
"""Limit on the bytes of a page's pictures, as they are written into it."""
_SMALL = 128
"""Pictures of at most this side are kept without loss."""


@dataclass(frozen=True)
class Embedded:
    """A picture as a page holds it."""

    uri: str
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        """True for a picture that a page enlarges, pixel by pixel."""
        return max(self.width, self.height) <= _SMALL


class Album:
    """The pictures of a page; one that would exceed the limit is left out and counted."""

    def __init__(self, limit: int = PICTURE_BYTES) -> None:
        self.limit, self.used, self.left_out = limit, 0, 0

    def add(self, path: Path, side: int = SIDE) -> Embedded | None:
        """Return a copy of at most `side` pixels; None if there is no room, or for a file that is no picture."""
        try:
            picture = embedded(open_image(path), side)
        except DataError:
            return None
        if self.used + len(picture.uri) > self.limit:
            self.left_out += 1
            return None
        self.used += len(picture.uri)
        return picture

    def sentence(self) -> str:
        """Return what was left out; empty if nothing was."""
        if not self.left_out:
            return ""
        pictures = "1 picture was" if self.left_out == 1 else f"{self.left_out} pictures were"
        return f"{pictures} left out: a page holds at most {self.limit / 2**20:.0f} MiB of them."


def embedded(image: Image.Image, side: int) -> Embedded:
    """Return a copy of at most `side` pixels: PNG if it is small, else WebP, or JPEG where Pillow lacks WebP."""
    copy = image.convert("RGB")
    copy.thumbnail((side, side))
    kind = "PNG" if max(copy.size) <= _SMALL else "WEBP" if features.check("webp") else "JPEG"
    file = io.BytesIO()
    copy.save(file, format=kind, quality=82)
    data = base64.b64encode(file.getvalue()).decode()
    return Embedded(f"data:image/{kind.lower()};base64,{data}", *copy.size)


def spread(steps: Sequence[int]) -> list[int]:
    """Return the steps in the order in which they matter: the last, the first, then the middles of the gaps."""
    if len(steps) < 3:
        return list(reversed(steps))
    order, gaps = [steps[-1], steps[0]], [(0, len(steps) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(steps[middle])
            gaps += [(low, middle), (middle, high)]
    return order

"""The masks of images, without torch; `crops` makes tensors of them. Sizes are (height, width)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from sd3tune.data.images import ImageRef, read_alpha, read_picture
from sd3tune.errors import DataError

_LEAST = 32
"""A mask whose brightest value, of 255, is below this has no inside. Maps of class numbers are such masks."""


@dataclass(frozen=True)
class Mask:
    """The mask of an image: a picture that is white inside, black outside, and grey for partial weights."""

    image: ImageRef
    is_alpha: bool = False
    """True if `image` is the masked image, whose alpha channel is the mask."""

    def __str__(self) -> str:
        return f"{self.image}: its alpha channel" if self.is_alpha else str(self.image)


def read_mask(mask: Mask) -> tuple[Image.Image, str]:
    """Return the upright mask in greys of 8 bits, and the SHA-256 of its file.

    Raises DataError for a file that cannot be decoded, that is transparent, or without an inside.
    """
    if mask.is_alpha:
        grey, digest = read_alpha(mask.image)
        remedy = "make some of the image opaque, or remove it"
    else:
        picture = read_picture(mask.image)
        if picture.reading.transparent:
            raise DataError(f"{mask}: the mask is transparent; save it without transparency, white inside")
        grey, digest = picture.image.convert("L"), picture.digest
        remedy = "paint the subject white, or delete the mask"
    brightest = int(np.asarray(grey).max())
    if brightest < _LEAST:
        raise DataError(f"{mask}: the mask has no inside, its brightest value is {brightest} of 255; {remedy}")
    return grey, digest


def check_mask_size(mask: Mask, size: tuple[int, int], image: ImageRef, image_size: tuple[int, int]) -> None:
    """Raise DataError if the mask has another aspect ratio than its image, beyond rounding to whole pixels."""
    (height, width), (high, wide) = size, image_size
    if abs(height * wide - width * high) > max(height + width, high + wide):
        raise DataError(
            f"{mask}: the mask is {width} x {height} px and {image.name} {wide} x {high} px; give both the same shape"
        )

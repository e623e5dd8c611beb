"""From an image's bytes to pixels: upright RGB, a crop, numbers in [-1, 1]. Sizes are (height, width)."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from sd3tune.data.sampler import derive
from sd3tune.errors import DataError

PREPROCESSING_VERSION = 1  # part of every image key: raise it whenever the same file would give other pixels

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# PIL refuses twice the pixels at which it warns (179 million); what lies between is a large photograph.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_MAX_ASPECT = 32  # beyond it a crop shows next to nothing, and covering it would take gigabytes
_EXIF_IN_PNG = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # nothing that runs a program, as EPS does


class ImageRef(Protocol):
    """Where the bytes of an image are: a `Path`, or the row of a dataset. Its `str` names it in messages."""

    @property
    def name(self) -> str: ...

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Crop:
    """A cut of an image that was scaled to cover `size`; `box` is (left, top, right, bottom) in that."""

    size: tuple[int, int]
    box: tuple[int, int, int, int]
    flip: bool


def read_image(image: ImageRef) -> tuple[Image.Image, str]:
    """The image as upright RGB, and the SHA-256 of the very bytes it was decoded from.

    EXIF rotation is applied, transparency is laid on white, 16-bit greys are scaled to 8 bits; of an
    animation the first frame is taken. Raises DataError, naming the image, for whatever cannot be decoded
    completely.
    """
    data = _read(image)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            return _rgb(opened), hashlib.sha256(data).hexdigest()
    except Exception as error:  # decoders of arbitrary bytes raise nearly anything
        raise DataError(f"{image}: {_complaint(error, len(data))}") from None


def open_image(image: ImageRef) -> Image.Image:
    """The image as upright RGB; see `read_image`."""
    return read_image(image)[0]


def file_digest(image: ImageRef) -> str:
    """The SHA-256 of the image's bytes, as `read_image` gives it, without decoding. Raises DataError."""
    return hashlib.sha256(_read(image)).hexdigest()


def check_header(image: ImageRef) -> None:
    """Raise DataError if the bytes do not begin like an image, or if it is far too large or too narrow.

    Of a file only the first bytes are read. What breaks off later passes.
    """
    content = None if isinstance(image, Path) else io.BytesIO(_read(image))
    try:
        with Image.open(content or str(image), formats=_FORMATS) as opened:
            width, height = opened.size
    except Exception as error:  # as above
        nbytes = content.getbuffer().nbytes if content else _size(str(image))
        raise DataError(f"{image}: {_complaint(error, nbytes)}") from None
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise DataError(f"{image}: is {width} x {height} px, too narrow to crop; cut it yourself or remove it")


def upright_size(image: ImageRef) -> tuple[int, int]:
    """The (height, width) that `read_image` gives, without decoding; of a file only the first bytes are read.

    A PNG whose EXIF data stands behind its pixels, which nothing common writes, counts as upright. Raises DataError.
    """
    content = str(image) if isinstance(image, Path) else io.BytesIO(_read(image))
    try:
        with Image.open(content, formats=_FORMATS) as opened:
            width, height = opened.size
            # A TIFF's size is the upright one already; a PNG without a sign of EXIF would be decoded to look for it.
            readable = opened.format != "TIFF" and (opened.format != "PNG" or bool(_EXIF_IN_PNG & opened.info.keys()))
            sideways = readable and opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception as error:  # as in read_image
        raise DataError(f"{image}: {_complaint(error, -1)}") from None
    return (width, height) if sideways else (height, width)


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else -1


def _read(image: ImageRef) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise DataError(f"{image}: cannot be read ({error.strerror})") from None


def _complaint(error: Exception, nbytes: int) -> str:
    if nbytes == 0:
        return "is empty (0 bytes); replace or remove it"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image, whatever its name says; replace or remove it"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more pixels than is safe to decode, {2 * (Image.MAX_IMAGE_PIXELS or 0):,}; scale it down"
    if isinstance(error, PermissionError):
        return f"cannot be read ({error.strerror}); check its permissions"
    return f"cannot be decoded ({error or type(error).__name__}); replace or remove it"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit pixels; save it with 8 or 16 bits per channel")
        image = Image.fromarray(np.round(grey / 257).astype(np.uint8))  # PIL's own conversion clips at 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_smaller(image_size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether the image has to be enlarged to cover `target`."""
    return image_size[0] < target[0] or image_size[1] < target[1]


def crops(image_size: tuple[int, int], target: tuple[int, int], variants: int, flip: bool, digest: str) -> list[Crop]:
    """The cuts of one image: variant 0 is centred, the others lie at random; `flip` adds each mirrored.

    A pure function of its arguments: `digest`, the SHA-256 of the file, seeds the positions. Always
    `variants * (1 + flip)` long, though cuts of an image that has `target`'s shape coincide. A longer list
    begins with the shorter one, so that raising `variants` encodes only what is new.
    """
    height, width = target
    spare_y, spare_x = (a - b for a, b in zip(_cover_size(image_size, target), target, strict=True))
    found = []
    for variant in range(variants):
        if variant == 0:
            top, left = spare_y // 2, spare_x // 2
        else:
            top = derive(int(digest, 16), "crop top", variant) % (spare_y + 1)
            left = derive(int(digest, 16), "crop left", variant) % (spare_x + 1)
        box = (left, top, left + width, top + height)
        found += [Crop(target, box, mirrored) for mirrored in ((False, True) if flip else (False,))]
    return found


def _cover_size(image_size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    (height, width), scale = image_size, max(target[0] / image_size[0], target[1] / image_size[1])
    return max(target[0], round(height * scale)), max(target[1], round(width * scale))


def cover(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """The image scaled (Lanczos), its shape kept, until it just covers `target`."""
    height, width = _cover_size((image.height, image.width), target)
    scaled: Image.Image = transforms.resize(image, [height, width], InterpolationMode.LANCZOS)
    return scaled


def pixels(image: Image.Image, crop: Crop) -> torch.Tensor:
    """The cut as fp32 [1, 3, h, w] in [-1, 1], bit-equal to diffusers' `VaeImageProcessor` on the cut image.

    Its memory layout is the same too, channels last: in another, convolutions round otherwise. `image` may
    already be scaled by `cover`, which saves doing so for every cut.
    """
    left, top, _, _ = crop.box
    cut = transforms.crop(cover(image, crop.size), top, left, *crop.size)
    if crop.flip:
        cut = transforms.horizontal_flip(cut)
    scaled = np.array(cut)[None].astype(np.float32) / 255.0
    return 2.0 * torch.from_numpy(scaled.transpose(0, 3, 1, 2)) - 1.0

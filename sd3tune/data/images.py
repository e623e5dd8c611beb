"""Decode images to upright RGB, without torch; `crops` makes tensors of them. Sizes are (height, width)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from sd3tune.data.colour import Reading, alpha_of, to_rgb
from sd3tune.data.formats import FORMATS, HEAD_BYTES, describe
from sd3tune.errors import DataError
from sd3tune.files.regular import complaint, open_regular, read_regular

PREPROCESSING_VERSION = 1
"""Part of every image key. Increase it if the pixels of most files change; use `Reading.mark` for a few."""

# A workflow or a colour profile in a PNG may exceed PIL's limit of 1 MiB; the total limit is 64 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
_MAX_ASPECT = 32  # beyond it a crop shows almost nothing, and scaling takes gigabytes
_EXIF_IN_PNG = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}


class ImageRef(Protocol):
    """The location of an image: a `Path`, a `FileBelow`, or the row of a dataset. Its `str` names it in messages."""

    @property
    def name(self) -> str: ...

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class FileBelow:
    """An image file in or below a source's folder, named by its path in that folder."""

    path: Path
    folder: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(self.folder).as_posix()

    def __str__(self) -> str:
        return str(self.path)

    def read_bytes(self) -> bytes:
        return read_regular(self.path)


def file_of(image: ImageRef) -> Path | None:
    """Return the file of an image; None for an image inside a dataset."""
    return image.path if isinstance(image, FileBelow) else image if isinstance(image, Path) else None


@dataclass(frozen=True)
class Picture:
    """A decoded image: upright 8-bit RGB, the SHA-256 of its source bytes, and the reading."""

    image: Image.Image
    digest: str
    reading: Reading
    size: tuple[int, int]
    """(height, width) of all of it, where `image` is reduced."""


def read_picture(image: ImageRef, at_least: int | None = None) -> Picture:
    """Decode an image, or the first frame of an animation: apply the EXIF rotation, then `to_rgb`.

    With `at_least`, in pixels, a JPEG is reduced 2, 4 or 8 times as long as both sides stay that long; all of its bytes
    are decoded nevertheless. Raises DataError, naming the image, if it cannot be decoded completely.
    """
    data = image_bytes(image)
    with _explained(image, data), Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        width, height = opened.size
        reduced = at_least is not None and opened.draft(None, (at_least, at_least)) is not None
        orientation = _turn_upright(opened)
        rgb, reading = to_rgb(opened)
        if not reduced:
            width, height = rgb.size
        elif orientation >= 5:
            width, height = height, width
        return Picture(rgb, hashlib.sha256(data).hexdigest(), reading, (height, width))


def read_alpha(image: ImageRef) -> tuple[Image.Image, str]:
    """Return the alpha channel of the upright image as greys, white without one, and the SHA-256 of the image's bytes.

    Raises DataError as `read_picture` does.
    """
    data = image_bytes(image)
    with _explained(image, data), Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        _turn_upright(opened)
        return alpha_of(opened), hashlib.sha256(data).hexdigest()


def _turn_upright(opened: Image.Image) -> int:
    """Decode an image and apply the EXIF rotation, in place. Return the orientation that it had."""
    opened.load()
    orientation = _orientation(opened)
    if orientation != 1:
        ImageOps.exif_transpose(opened, in_place=True)
    return orientation


@contextmanager
def _explained(image: ImageRef, data: bytes) -> Iterator[None]:
    """Raise DataError, naming the image, for any error of a decoder."""
    try:
        yield
    except Exception as error:  # decoders may raise anything for arbitrary bytes
        raise DataError(f"{image}: {_complaint(error, data)}") from None


def read_image(image: ImageRef) -> tuple[Image.Image, str]:
    """Return the image and the SHA-256 of its bytes; see `read_picture`."""
    picture = read_picture(image)
    return picture.image, picture.digest


def reading_warnings(read: Iterable[tuple[ImageRef, Reading]]) -> list[str]:
    """Return a warning about transparency, and one for each image whose colour profile cannot be applied."""
    pictures = list(read)
    clear = [image.name for image, reading in pictures if reading.transparent]
    lines = []
    if clear:
        have = "1 image has" if len(clear) == 1 else f"{len(clear)} images have"
        lines.append(
            f"{have} transparent parts, which are laid on white: {', '.join(clear[:3])}{', ...' * (len(clear) > 3)}; "
            "masks: alpha uses them as masks"
        )
    troubled = dict.fromkeys(
        f"{image}: its colour profile {reading.trouble}; its colours are taken as sRGB"
        for image, reading in pictures
        if reading.trouble
    )
    return [*lines, *troubled]


def open_image(image: ImageRef) -> Image.Image:
    """Return the image as upright RGB; see `read_image`."""
    return read_image(image)[0]


def file_digest(image: ImageRef) -> str:
    """Return the SHA-256 of the image's bytes, without decoding. Raises DataError."""
    return hashlib.sha256(image_bytes(image)).hexdigest()


def check_header(image: ImageRef) -> tuple[int, int]:
    """Return `upright_size`. Raises DataError, also for an image that is far too large or too narrow.

    Only the first bytes of a file are read, so a truncated file passes.
    """
    with _opened(image) as opened:
        (width, height), upright = opened.size, _upright_size(opened)
    check_shape(image, (height, width))
    return upright


def check_shape(image: ImageRef, size: tuple[int, int]) -> None:
    """Raise DataError for an image that is too narrow; `size` is (height, width)."""
    height, width = size
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise DataError(f"{image}: is {width} x {height} px, too narrow to crop; cut it yourself or remove it")


def upright_size(image: ImageRef) -> tuple[int, int]:
    """Return the (height, width) of the upright image, from the first bytes of a file, without decoding.

    A PNG with EXIF data after its pixels, which no common program writes, counts as upright. Raises DataError.
    """
    with _opened(image) as opened:
        return _upright_size(opened)


def _upright_size(opened: Image.Image) -> tuple[int, int]:
    width, height = opened.size
    # Pillow gives a TIFF's upright size already. It would decode a PNG to search for EXIF, so that is avoided.
    readable = opened.format != "TIFF" and (opened.format != "PNG" or bool(_EXIF_IN_PNG & opened.info.keys()))
    sideways = readable and _orientation(opened) >= 5
    return (width, height) if sideways else (height, width)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is missing, invalid or damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as for pixels
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


@contextmanager
def _opened(image: ImageRef) -> Iterator[Image.Image]:
    """Open the image without decoding; only the first bytes of a file are read. Raises DataError."""
    try:
        path = file_of(image)
        file = open_regular(path) if path else io.BytesIO(image.read_bytes())
    except OSError as error:
        raise DataError(f"{image}: {complaint(error)}") from None
    with file:
        head = file.read(HEAD_BYTES)
        try:
            with Image.open(file, formats=FORMATS) as opened:
                yield opened
        except Exception as error:  # as for pixels
            raise DataError(f"{image}: {_complaint(error, head)}") from None


def image_bytes(image: ImageRef) -> bytes:
    """Return the image's stored bytes. Raises DataError, also for an irregular or too large file."""
    try:
        return read_regular(image) if isinstance(image, Path) else image.read_bytes()
    except OSError as error:
        raise DataError(f"{image}: {complaint(error)}") from None


def _complaint(error: Exception, data: bytes) -> str:
    """Return the fault of an image, given at least its first bytes."""
    if not data:
        return "is empty (0 bytes); replace or remove it"
    if isinstance(error, UnidentifiedImageError):
        return f"is {describe(data[:HEAD_BYTES])}"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more pixels than is safe to decode, {2 * (Image.MAX_IMAGE_PIXELS or 0):,}; scale it down"
    return f"cannot be decoded ({error or type(error).__name__}); replace or remove it"


def is_smaller(image_size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Return True if the image must be enlarged to cover `target`."""
    return image_size[0] < target[0] or image_size[1] < target[1]

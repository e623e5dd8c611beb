"""Small versions of pictures, made when the browser asks for one that it shows; a browser keeps them by their time."""

from __future__ import annotations

import functools
import io
import threading
from pathlib import Path

from PIL import Image, ImageOps

from sd3tune.data.formats import PILLOWS_FORMATS
from sd3tune.data.images import read_picture
from sd3tune.errors import DataError, UserError
from sd3tune.files.regular import complaint, open_regular

SIDES = (96, 192, 384, 768)
"""The sides that there are, in pixels."""
FOR_LONG = {"cache-control": "private, max-age=31536000, immutable"}
"""For addresses of pictures that name the time of the file's last change."""
_KEPT = 1024
"""Small pictures in memory, some kilobytes each."""
_DECODING = threading.Semaphore(2)
"""Large photos take hundreds of megabytes while they are decoded."""


class NoPicture(UserError):
    """A file that is no picture, or whose format browsers do not show."""


def small_picture(path: Path, side: int) -> bytes:
    """Return a picture upright, scaled down to fit into a square, as WebP. Raises NoPicture."""
    try:
        found = path.stat()
    except OSError as error:
        raise NoPicture(f"{path}: {complaint(error)}") from None
    return _small(path, min(SIDES, key=lambda known: abs(known - side)), found.st_mtime_ns, found.st_size)


@functools.lru_cache(_KEPT)
def _small(path: Path, side: int, changed: int, size: int) -> bytes:
    with _DECODING:
        try:
            image = read_picture(path, at_least=side).image
        except DataError as error:
            raise NoPicture(*error.problems) from None
        smaller = ImageOps.contain(image, (side, side)) if max(image.size) > side else image
        written = io.BytesIO()
        smaller.save(written, "WEBP", quality=82, method=2)
    return written.getvalue()


def picture_type(path: Path) -> str:
    """Return the media type of a picture that browsers show, by its content. Raises NoPicture for any other file."""
    try:
        with open_regular(path) as file, Image.open(file, formats=PILLOWS_FORMATS) as opened:
            return Image.MIME[opened.format or ""]
    except OSError as error:
        raise NoPicture(f"{path}: {complaint(error)}") from None
    except Exception:  # decoders may raise anything
        raise NoPicture(f"{path}: not a picture that browsers show") from None

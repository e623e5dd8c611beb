"""The picture formats that are read, their file names, and a description of any other file."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import warnings
from collections.abc import Mapping

from PIL import Image

from sd3tune.data.names import suffix_of

# Pillow's warnings and logs do not name the file; relevant faults are reported here. It warns at 89 million pixels, a
# large photograph, and refuses twice as many.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

Image.init()  # imports the plugins, which register the formats of this build
with contextlib.suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()
_TRUSTED = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # no format that runs a program, as EPS does
_SUFFIXES: Mapping[str, str] = Image.registered_extensions()
"""File name extension -> format. Pillow registers WebP and AVIF only if it has their codecs."""

PILLOWS_FORMATS = tuple(name for name in _TRUSTED if name in _SUFFIXES.values())
READS_HEIC = "HEIF" in _SUFFIXES.values()
"""True if pillow-heif is installed; it turns images upright itself."""
FORMATS = (*PILLOWS_FORMATS, *(["HEIF"] if READS_HEIC else []))
"""The formats that are read, regardless of a file's name."""

EXTENSIONS = tuple(end for end, name in _SUFFIXES.items() if name in (*FORMATS, "MPO"))  # MPO: a sequence of JPEGs
"""The extensions of files that are read, in lower case."""

HEIC = (".heic", ".heif", ".hif")
HEIC_EXTRA = "pip install 'sd3tune[heic]'"
_UNREAD = {*HEIC, ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"} | {
    end for end, name in _SUFFIXES.items() if Image.MIME.get(name, "").startswith("image/")
} | {".avif", ".webp", ".dds", ".exr", ".hdr"}  # fmt: skip

_WEB_PAGE = rb"\s*(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b"
_SIGNATURES = [
    (rb"version https://git-lfs", "a Git LFS pointer and not the picture; fetch it with `git lfs pull`"),
    (rb"/annex/objects/", "a git-annex pointer and not the picture; fetch it with `git annex get`"),
    (_WEB_PAGE, "a web page (HTML) and not a picture; download the picture itself"),
    (rb"....ftyp(?:hei|hev|(?:mif1|msf1)(?!.{4,40}?avi[fs]))", "a HEIC picture, {heic}"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture, which cannot be read; {convert}"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture, which cannot be read; {convert}"),
    (rb"8BPS", "a Photoshop document, which cannot be read; {convert}"),
    (rb"\s*(?:<\?xml.*?\?>\s*)?(?:<!.*?>\s*)*<svg\b", "an SVG drawing, which cannot be read; {convert}"),
    (rb"%PDF-", "a PDF document, which cannot be read; {convert}"),
    (rb"%!PS", "a PostScript document, which cannot be read; {convert}"),
    (rb"....ftyp(?!avi[fs]|mif1|msf1)", "a video and not a picture; replace or remove it"),
    (rb"PK\x03\x04", "a ZIP archive and not a picture; unpack it"),
]  # fmt: skip
"""(pattern of a file's first bytes, its kind and the remedy). The first match applies. Pillow detects AVIF itself."""

HEAD_BYTES = 512
"""The number of first bytes that `describe` needs."""


def is_picture(name: str) -> bool:
    """Return True if a file name is an image's, in a supported format or not."""
    suffix = suffix_of(name)
    return suffix in EXTENSIONS or suffix in _UNREAD


def describe(head: bytes) -> str:
    """Return the kind of a file that Pillow cannot open, and the remedy, to follow `photo.jpg: is `."""
    for signature, text in _SIGNATURES:
        if re.match(signature, head, re.DOTALL | re.IGNORECASE):
            convert = "convert it to JPEG or PNG"
            needs = f"which needs pillow-heif: {HEIC_EXTRA}, or {convert}"
            return text.format(
                convert=convert, heic=f"damaged or of an unusual kind; {convert}" if READS_HEIC else needs
            )
    for name in set(_TRUSTED) & Image.OPEN.keys():
        accept = Image.OPEN[name][1]
        answer = accept is not None and accept(head)
        if isinstance(answer, str):  # the reason why this build of Pillow lacks the codec
            return (
                f"a picture in {name} format, which this installation of Pillow cannot read; convert it to JPEG or PNG"
            )
        if answer:
            return f"a picture in {name} format, damaged or of an unusual kind; save it again with 8 bits per channel"
    return "not an image, whatever its name says; replace or remove it"

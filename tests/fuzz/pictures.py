"""Picture files: of many formats and modes, with odd headers and metadata, damaged or of another kind altogether."""

from __future__ import annotations

import io
import json
import struct
import zlib
from functools import cache
from typing import Any

from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FORMATS: dict[str, tuple[str, ...]] = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "GIF": ("P", "L", "RGB"),
    "BMP": ("RGB", "P", "1", "L"),
    "TIFF": ("RGB", "RGBA", "CMYK", "F", "I;16", "1", "LAB", "YCbCr"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB",),
}
ENDINGS = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "WEBP": ".webp",
    "AVIF": ".avif",
}
SIZES = ((1, 1), (16, 16), (70, 64), (3, 200))
_NUMBERS = (0, 1, 2, 255, 256, 40_000, 65_535, 2**31 - 1, 2**31, 2**32 - 1)
_OTHERS = (
    b"", b"\0", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\xff\xff\xff\xffWEBPVP8X", b"BM",
    b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"%!PS-Adobe\n", b"<svg onload=x>", b"<!--" * 200, b"PK\x03\x04", b"8BPS",
    b"\0\0\0\x20ftypavif", b"\0\0\0\x20ftypheic", b"version https://git-lfs\n", b"P6 99999999 99999999 255\n",
    b"/annex/objects/x", b"<?xml " * 80, b"\0\0\0\x0cJXL ",
)  # fmt: skip


@cache
def encoded(form: str, mode: str, size: tuple[int, int], frames: int = 1, **options: Any) -> bytes:
    """A picture of that format; `options` are those of Pillow."""
    images = [Image.new("RGB", size, (40 * number, 90, 200)).convert(_drawable(mode)) for number in range(frames)]
    images = [image if image.mode == mode else _reinterpreted(image, mode) for image in images]
    more: dict[str, Any] = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    file = io.BytesIO()
    images[0].save(file, form, **more, **options)
    return file.getvalue()


def _drawable(mode: str) -> str:
    return mode if mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "LAB", "HSV") else "L"


def _reinterpreted(image: Image.Image, mode: str) -> Image.Image:
    return Image.new(mode, image.size, 7)


@st.composite
def whole(draw: st.DrawFn) -> tuple[str, bytes]:
    """A picture that is valid, with the ending of its name."""
    form = draw(st.sampled_from([name for name in FORMATS if name in Image.SAVE]))
    mode, size = draw(st.sampled_from(FORMATS[form])), draw(st.sampled_from(SIZES))
    options: dict[str, Any] = {}
    if form in ("PNG", "JPEG", "WEBP", "TIFF") and draw(st.booleans()):
        options["exif"] = b"Exif\0\0" + draw(exif())
    if form in ("PNG", "JPEG", "TIFF", "WEBP") and not draw(st.integers(0, 3)):
        options["icc_profile"] = draw(st.sampled_from([b"", b"x" * 200, bytes(128) + b"acsp"]) | st.binary(max_size=60))
    frames = draw(st.sampled_from([1, 1, 3])) if form in ("PNG", "GIF", "TIFF", "WEBP") else 1
    if mode == "P" and form in ("PNG", "GIF") and draw(st.booleans()):
        options["transparency"] = draw(st.sampled_from([0, 255]))
    try:
        return ENDINGS[form], encoded(form, mode, size, frames, **options)
    except Exception:  # not each of the options goes with each of the modes
        return ENDINGS[form], encoded(form, FORMATS[form][0], size)


@st.composite
def exif(draw: st.DrawFn) -> bytes:
    """A TIFF directory with a few entries of any kind."""
    order = draw(st.sampled_from("<>"))
    entries = draw(st.lists(st.tuples(_TAGS, _KINDS, _COUNTS, _COUNTS), max_size=4))
    body = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    start = draw(st.sampled_from([8, 8, 8, 0, 2**32 - 1]))
    return mark + struct.pack(f"{order}IH", start, len(entries)) + body + struct.pack(f"{order}I", draw(_COUNTS))


_TAGS = st.sampled_from([0x0112, 0x0112, 0x0100, 0x0102, 0x0103, 0x8769, 0x8825, 0xA005, 0x927C, 0x0000])
_KINDS = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 10, 12, 13, 16, 99])
_COUNTS = st.sampled_from([0, 1, 3, 6, 8, 9, 10, 65_535, 2**31, 2**32 - 1])


@st.composite
def hurt(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with numbers of the header replaced, cut short or mixed up; a PNG's checksums are right again."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(found) - 1, 0)) | st.integers(0, min(64, max(len(found) - 1, 0))))
        number, form = draw(st.sampled_from(_NUMBERS)), draw(st.sampled_from([">I", "<I", ">H", "<H", ">B"]))
        piece = struct.pack(form, number % 256 ** struct.calcsize(form))
        found[place : place + len(piece)] = piece
    if not draw(st.integers(0, 3)):
        del found[draw(st.integers(0, len(found))) :]
    if not draw(st.integers(0, 5)):
        found += draw(st.binary(max_size=20)) * draw(st.sampled_from([1, 500]))
    return with_checksums(bytes(found)) if draw(st.booleans()) else bytes(found)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what is in them, as far as it has chunks; other data as it is."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    found, rest = data[:8], data[8:]
    while len(rest) >= 12 and (size := int.from_bytes(rest[:4], "big")) <= len(rest) - 12:
        body = rest[4 : 8 + size]
        found += rest[:4] + body + struct.pack(">I", zlib.crc32(body))
        rest = rest[12 + size :]
    return found + rest


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(*chunks: bytes, size: tuple[int, int] = (16, 16)) -> bytes:
    """A PNG with further chunks behind its header."""
    data = encoded("PNG", "RGB", size)
    return data[:33] + b"".join(chunks) + data[33:]


def png_saying(texts: dict[str, Any]) -> bytes:
    """A small PNG with these text chunks, values as JSON unless they are texts."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(file, "PNG", pnginfo=info)
    return file.getvalue()


@st.composite
def odd_pngs(draw: st.DrawFn) -> bytes:
    """PNGs that are well-formed and odd: of any stated size, depth and interlacing; texts that unpack to megabytes."""
    header = struct.pack(
        ">IIBBBBB",
        draw(st.sampled_from([0, 1, 16, 3000, 70_000, 2**31 - 1])),
        draw(st.sampled_from([0, 1, 16, 3000, 70_000, 2**31 - 1])),
        draw(st.sampled_from([1, 2, 4, 8, 16, 3])),
        draw(st.sampled_from([0, 2, 3, 4, 6, 1])),
        draw(st.sampled_from([0, 0, 1])),
        0,
        draw(st.sampled_from([0, 0, 1, 2])),
    )
    bomb = zlib.compress(bytes(draw(st.sampled_from([100, 10**5, 10**8]))))
    more = {
        "nothing": b"",
        "zTXt": chunk(b"zTXt", b"sd3tune\0\0" + bomb),
        "iTXt": chunk(b"iTXt", b"sd3tune\0\1\0\0\0" + bomb),
        "tEXt": chunk(b"tEXt", b"sd3tune\0" + b"[" * 10**5),
        "iCCP": chunk(b"iCCP", b"x\0\0" + bomb),
        "eXIf": chunk(b"eXIf", draw(exif())),
        "acTL": chunk(b"acTL", struct.pack(">II", draw(st.sampled_from([0, 1, 2**31])), 0)),
        "tRNS": chunk(b"tRNS", draw(st.binary(max_size=8))),
        "PLTE": chunk(b"PLTE", bytes(draw(st.sampled_from([0, 3, 4, 768])))),
    }
    inside = draw(st.lists(st.sampled_from(list(more)), max_size=2))
    pixels = zlib.compress(bytes(draw(st.sampled_from([0, 100, 800, 10**5]))))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more[name] for name in inside)
    return start + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def files() -> st.SearchStrategy[tuple[str, bytes]]:
    """(ending, bytes) of what might lie in a folder of photos."""
    endings = st.sampled_from([*ENDINGS.values(), ".JPEG", ".heic"])
    others = st.tuples(
        endings, st.sampled_from(_OTHERS).flatmap(lambda data: st.just(data) | st.just(data + bytes(99)))
    )
    return st.one_of(
        whole(),
        whole().flatmap(lambda named: st.tuples(st.just(named[0]) | endings, hurt(named[1]))),
        whole().flatmap(lambda named: st.tuples(st.just(named[0]), hurt(named[1]))),
        st.tuples(st.just(".png"), odd_pngs()),
        others,
    )

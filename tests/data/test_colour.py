"""Colour profiles, ranges and transparency: what becomes of pixels that are not sRGB in 8 bits."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from sd3tune.data.images import Picture, read_picture, reading_warnings

P3 = [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]
ADOBE = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
PROPHOTO = [(0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03135, 0.00008, 0.82491)]
SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def curve(values: float | np.ndarray) -> bytes:
    if isinstance(values, float):
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(values * 256))
    return b"curv\0\0\0\0" + struct.pack(">I", len(values)) + np.round(values * 65535).astype(">u2").tobytes()


def profile(tone: float | np.ndarray, primaries: list[tuple[float, float, float]] | None) -> bytes:
    """An ICC profile of version 2: for RGB by its primaries (XYZ under D50), without them for greys."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79),
        b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(fixed, (0.9642, 1.0, 0.8249))),
    }
    for letter, xyz in zip((b"r", b"g", b"b") if primaries else (), primaries or (), strict=True):
        tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz))
        tags[letter + b"TRC"] = curve(tone)
    if not primaries:
        tags[b"kTRC"] = curve(tone)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(padded))
        body += padded
    head = struct.pack(">I", 128 + len(table) + len(body)) + bytes(4) + b"\x02\x20\0\0mntr"
    head += (b"RGB " if primaries else b"GRAY") + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + table + body


def srgb_tone(points: int) -> np.ndarray:
    x = np.linspace(0, 1, points)
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def ramp() -> np.ndarray:
    """Colours that all three spaces hold: uint8 [48, 64, 3]."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([60 + 2 * x, 70 + 2 * y, 150 - x], axis=-1).astype(np.uint8)


def exact(values: np.ndarray, primaries: list[tuple[float, float, float]], gamma: float) -> np.ndarray:
    """The sRGB levels of those of another space, in float64: through XYZ by the matrices of the primaries."""
    linear = (values / 255.0) ** gamma @ np.array(primaries) @ np.linalg.inv(np.array(SRGB))
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: object) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def levels(picture: Picture) -> np.ndarray:
    assert picture.image.mode == "RGB"
    return np.asarray(picture.image).astype(float)


@pytest.mark.parametrize(
    ("primaries", "gamma"), [(P3, 2.2), (ADOBE, 2.2), (PROPHOTO, 1.8)], ids=["p3", "adobe", "prophoto"]
)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_an_embedded_profile_is_converted_to_srgb(tmp_path: Path, primaries, gamma: float, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path, Image.fromarray(ramp()), f"a.{suffix}", icc_profile=profile(gamma, primaries), **options)
    picture = read_picture(path)
    off = np.abs(levels(picture) - exact(ramp(), primaries, gamma))
    assert off.max() < 1.5
    assert np.abs(levels(picture) - ramp()).max() > 8  # and that is not what was stored
    assert picture.reading.mark == "sRGB"
    assert reading_warnings([(path, picture.reading)]) == []


@pytest.mark.parametrize(
    "embedded",
    [
        profile(srgb_tone(1024), SRGB),
        profile(srgb_tone(4096), SRGB),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        None,
    ],
    ids=["1024 points", "4096 points", "lcms", "none"],
)
def test_a_profile_that_is_srgb_changes_no_pixel_and_no_key(tmp_path: Path, embedded: bytes | None) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    picture = read_picture(saved(tmp_path, image, **({"icc_profile": embedded} if embedded else {})))
    assert picture.image.tobytes() == image.tobytes()
    assert picture.reading.mark == ""


def test_a_grey_profile_is_followed(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8)[None]
    expected = exact(np.repeat(grey[..., None], 3, -1), SRGB, 1.8)
    for image in (Image.fromarray(grey), Image.merge("LA", [Image.fromarray(grey), Image.new("L", (256, 1), 255)])):
        picture = read_picture(saved(tmp_path, image, icc_profile=profile(1.8, None)))
        assert np.abs(levels(picture) - expected).max() < 1.5
        assert picture.reading.mark == "sRGB"


def test_a_profile_for_colours_fits_greys_and_palettes(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    expected = exact(np.asarray(grey.convert("RGB")), P3, 1.8)
    for image in (grey, grey.convert("P")):
        picture = read_picture(saved(tmp_path, image, icc_profile=profile(1.8, P3)))
        assert np.abs(levels(picture) - expected).max() < 1.5


def test_colours_are_converted_before_they_are_laid_on_white(tmp_path: Path) -> None:
    alpha = np.full((48, 64, 1), 255, np.uint8)
    alpha[:, 32:] = 0
    image = Image.fromarray(np.concatenate([ramp(), alpha], -1))
    picture = read_picture(saved(tmp_path, image, icc_profile=profile(2.2, P3)))
    assert (levels(picture)[:, 32:] == 255).all()
    assert np.abs(levels(picture)[:, :32] - exact(ramp(), P3, 2.2)[:, :32]).max() < 1.5
    assert picture.reading.transparent


def test_an_opaque_alpha_channel_is_not_called_transparent(tmp_path: Path) -> None:
    opaque, half = (Image.new("RGBA", (48, 64), (9, 99, 199, alpha)) for alpha in (255, 254))
    picture = read_picture(saved(tmp_path, opaque))
    assert not picture.reading.transparent
    assert (levels(picture) == (9, 99, 199)).all()
    assert read_picture(saved(tmp_path, half)).reading.transparent


def cmyk_profile(black: float = 0.0) -> bytes:
    """Inks that absorb, down to `black`: a table of 3 steps an ink, from CMYK to XYZ, as version 2 has it."""
    steps = np.linspace(0, 1, 3)
    c, m, y, k = np.meshgrid(steps, steps, steps, steps, indexing="ij")
    rgb = np.stack([(1 - ink) * (1 - k) for ink in (c, m, y)], -1) * (1 - black) + black
    table = np.round((rgb @ np.array(SRGB)).clip(0, 1.999) * 32768).astype(">u2")
    line = struct.pack(">HH", 0, 65535)
    lut = b"mft2\0\0\0\0" + bytes([4, 3, 3, 0]) + b"".join(map(fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    lut += struct.pack(">HH", 2, 2) + line * 4 + table.tobytes() + line * 3
    tags = {b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(fixed, (0.9642, 1.0, 0.8249))), b"A2B0": lut, b"A2B1": lut}
    index, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        index += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(padded))
        body += padded
    head = struct.pack(">I", 128 + len(index) + len(body)) + bytes(4) + b"\x02\x20\0\0prtrCMYKXYZ " + bytes(12)
    head += b"acsp" + bytes(28) + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + index + body


def test_a_cmyk_profile_is_followed(tmp_path: Path) -> None:
    image = Image.new("CMYK", (32, 32), (0, 0, 0, 128))
    with_profile = read_picture(saved(tmp_path, image, "a.tif", icc_profile=cmyk_profile()))
    without = read_picture(saved(tmp_path, image, "b.tif"))
    assert levels(without)[0, 0].tolist() == [127, 127, 127]
    linear = 255 * (1.055 * (127 / 255) ** (1 / 2.4) - 0.055)  # half of the light, not half of the level
    assert np.abs(levels(with_profile)[0, 0] - linear).max() < 3
    assert (with_profile.reading.mark, without.reading.mark) == ("sRGB", "")


def test_the_black_of_a_press_becomes_black(tmp_path: Path) -> None:
    image = Image.new("CMYK", (32, 32), (0, 0, 0, 255))
    scanned = cmyk_profile(black=0.02).replace(b"prtrCMYK", b"scnrCMYK")  # its black is found without a way back
    picture = read_picture(saved(tmp_path, image, "a.tif", icc_profile=scanned))
    assert levels(picture).max() <= 2  # 39 without compensation


@pytest.mark.parametrize(
    ("embedded", "mode", "says"),
    [
        (b"not a profile", "RGB", "is damaged"),
        (profile(2.2, P3)[:200], "RGB", "is damaged"),
        (profile(2.2, P3).replace(b"rTRC", b"xTRC"), "RGB", "is damaged"),
        (profile(2.2, None), "RGB", "is for grey and the picture is RGB"),
        (profile(2.2, P3), "CMYK", "is for RGB and the picture is CMYK"),
    ],
)
def test_a_broken_profile_is_a_warning_that_names_the_file(tmp_path: Path, embedded, mode: str, says: str) -> None:
    image = Image.fromarray(ramp()).convert(mode)
    plain = read_picture(saved(tmp_path, image, "plain.tif"))
    path = saved(tmp_path, image, "a.tif", icc_profile=embedded)
    picture = read_picture(path)
    assert picture.image.tobytes() == plain.image.tobytes()
    assert picture.reading.mark == ""
    (line,) = reading_warnings([(path, picture.reading)])
    assert line == f"{path}: its colour profile {says}; its colours are taken as sRGB"


def test_transparent_pictures_are_counted() -> None:
    clear = read_picture(Bytes(Image.new("RGBA", (8, 8), (1, 2, 3, 0)), "clear.png"))
    solid = read_picture(Bytes(Image.new("RGB", (8, 8)), "solid.png"))
    one, several = [(Named("a.png"), clear.reading)], [(Named(f"{n}.png"), clear.reading) for n in range(5)]
    assert reading_warnings([*one, (Named("b.png"), solid.reading)]) == [
        "1 image has transparent parts, which are laid on white: a.png; masks: alpha uses them as masks"
    ]
    assert reading_warnings(several) == [
        "5 images have transparent parts, which are laid on white: 0.png, 1.png, 2.png, ...; "
        "masks: alpha uses them as masks"
    ]


class Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def read_bytes(self) -> bytes:
        raise NotImplementedError


class Bytes(Named):
    def __init__(self, image: Image.Image, name: str) -> None:
        super().__init__(name)
        self.image = image

    def read_bytes(self) -> bytes:
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG")
        return buffer.getvalue()


@pytest.mark.parametrize(
    ("values", "expected", "mark"),
    [
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255], "range"),
        (np.array([[0, 300, 65535]], np.int32), [0, 1, 255], ""),
        (np.array([[0, 128, 255]], np.uint16), [0, 0, 1], ""),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255], "range"),
        (np.array([[0.0, 128.0, 255.0]], np.float32), [0, 128, 255], "range"),
        (np.array([[0.0, 32896.0, 65535.0]], np.float32), [0, 128, 255], "range"),
    ],
)
def test_wide_greys_are_read_with_their_range(tmp_path: Path, values: np.ndarray, expected, mark: str) -> None:
    picture = read_picture(saved(tmp_path, Image.fromarray(values), "a.tif"))
    assert levels(picture)[0, :, 0].tolist() == expected
    assert picture.reading.mark == mark

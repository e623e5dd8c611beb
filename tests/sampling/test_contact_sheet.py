"""Pictures in a grid, with labels."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops

from sd3tune.sampling.contact_sheet import contact_sheet

RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")


def boxes(sheet: Image.Image, colour: str) -> tuple[int, int, int, int] | None:
    """The box around everything that is exactly of this colour."""
    difference = ImageChops.difference(sheet, Image.new("RGB", sheet.size, colour))
    return difference.convert("L").point(lambda value: 255 * (value == 0)).getbbox()


def test_each_picture_has_its_place_and_keeps_its_pixels() -> None:
    sheet = contact_sheet([[RED, BLUE], [BLUE, RED]], side=64)
    assert sheet.size == (8 + 2 * 72, 8 + 2 * 72)
    for x, y, colour in ((8, 8, "red"), (80, 8, "blue"), (8, 80, "blue"), (80, 80, "red")):
        part = sheet.crop((x, y, x + 64, y + 64))
        assert boxes(part, colour) == (0, 0, 64, 64)


def test_labels_stand_above_and_cover_no_picture() -> None:
    plain = contact_sheet([[RED, BLUE]], side=64)
    labelled = contact_sheet([[RED, BLUE]], ["step 0", "step 1"], ["a dog on a beach"], side=64)
    assert labelled.height == plain.height + 28 - 8 + 28
    above, pictures = labelled.crop((0, 0, labelled.width, 56)), labelled.crop((8, 56, 144, 120))
    assert len(above.getcolors(1 << 16) or []) > 2, "something is written there"
    assert ImageChops.difference(pictures, plain.crop((8, 8, 144, 72))).getbbox() is None


def test_a_picture_has_its_own_text_below_and_nothing_is_covered() -> None:
    plain = contact_sheet([[RED, BLUE], [BLUE]], side=64)
    told = contact_sheet([[RED, BLUE], [BLUE]], side=64, cells=[["a.png " + "a long caption " * 20, ""], ["b"]])
    assert told.height == plain.height + 2 * 52
    for x, y, colour in ((8, 8, "red"), (80, 8, "blue"), (8, 8 + 72 + 52, "blue")):
        assert boxes(told.crop((x, y, x + 64, y + 64)), colour) == (0, 0, 64, 64)
    below = [told.crop((x, 74, x + 64, 130)).getcolors(1 << 16) or [] for x in (8, 80)]
    assert len(below[0]) > 2
    assert len(below[1]) == 1


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (640, 320), (16, 8)])
def test_a_picture_of_another_shape_is_fitted_whole_and_centred(size: tuple[int, int]) -> None:
    sheet = contact_sheet([[Image.new("RGB", size, "red")]], side=64)
    left, top, right, bottom = boxes(sheet, "red") or (0, 0, 0, 0)
    wide, high = (64, 32) if size[0] > size[1] else (32, 64)
    assert (right - left, bottom - top) == (wide, high)
    assert (left + right, top + bottom) == sheet.size


def test_a_missing_picture_leaves_its_place_white() -> None:
    sheet = contact_sheet([[RED, None], [None, BLUE]], side=64)
    assert boxes(sheet, "red") == (8, 8, 72, 72)
    assert boxes(sheet, "blue") == (80, 80, 144, 144)


def test_a_long_label_is_cut_and_never_wider_than_the_sheet() -> None:
    sheet = contact_sheet([[RED]], rows=["many words " * 50], side=64)
    margin = sheet.crop((sheet.width - 2, 0, sheet.width, sheet.height))
    assert sheet.width == 80
    assert margin.getcolors() == [(2 * sheet.height, (255, 255, 255))]


def test_any_text_and_any_mode_of_picture_will_do() -> None:
    modes = [Image.new("RGB", (8, 8), "red").convert(mode) for mode in ("RGB", "L", "RGBA", "P", "1")]
    plain = contact_sheet([modes], side=32)
    sheet = contact_sheet([modes], ["", "two\nlines", "日本語", "é", "a" * 300], ["🐶"], side=32)
    assert sheet.width == plain.width == 8 + len(modes) * 40
    above, pictures = sheet.crop((0, 0, sheet.width, 56)), sheet.crop((8, 56, sheet.width, 56 + 32))
    assert len(above.getcolors(1 << 16) or []) > 2, "something is written there"
    assert ImageChops.difference(pictures, plain.crop((8, 8, plain.width, 8 + 32))).getbbox() is None
    for number, image in enumerate(modes):
        assert plain.getpixel((8 + 40 * number + 16, 8 + 16)) == image.convert("RGB").getpixel((4, 4)), image.mode

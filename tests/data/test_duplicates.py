import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sd3tune.data import duplicates
from sd3tune.data.duplicates import near_duplicates, thumbnail

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "dreambooth"


def drawn(seed):
    """Some blobs on a background."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (160, 120), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, r = rng.integers(0, 160), rng.integers(0, 120), rng.integers(10, 50)
        draw.ellipse((int(x - r), int(y - r), int(x + r), int(y + r)), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def compressed(image, quality=30):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def groups(images):
    return near_duplicates([thumbnail(image) for image in images])


def test_a_scaled_and_a_compressed_copy_are_found_and_others_are_not():
    one, two, three = drawn(0), drawn(1), drawn(2)
    assert groups([one, two, one.resize((80, 60)), three, compressed(one), compressed(three)]) == [[0, 2, 4], [3, 5]]


def test_plain_pictures_of_other_colours_are_not_the_same():
    assert groups([Image.new("RGB", (32, 32), (10 * n, 0, 0)) for n in range(20)]) == []


def test_few_or_no_pictures():
    assert groups([]) == groups([drawn(0)]) == []


def test_blocks_change_nothing(monkeypatch):
    images = [drawn(seed) for seed in range(9)]
    images += [compressed(image) for image in images]
    expected = [[number, number + 9] for number in range(9)]
    assert groups(images) == expected
    monkeypatch.setattr(duplicates, "_BLOCK", 4)
    assert groups(images) == expected


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the real photos are not here")
def test_real_photos_of_one_thing_are_not_duplicates():
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*/*.jpg"))[::2]]
    assert groups(photos) == []
    copies = [compressed(photo.resize((photo.width // 2, photo.height // 2))) for photo in photos]
    assert groups([*photos, *copies]) == [[number, number + len(photos)] for number in range(len(photos))]

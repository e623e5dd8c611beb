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


def test_the_groups_are_those_of_comparing_each_with_each():
    rng = np.random.default_rng(3)
    centres = rng.integers(0, 256, (40, 192))
    values = np.clip(
        centres[rng.integers(0, 40, 300)] + rng.normal(0, rng.choice([0.5, 2, 6], (300, 1)), (300, 192)), 0, 255
    )
    thumbnails = list(values.astype(np.uint8))
    distances = np.sqrt(
        ((values.astype(np.uint8)[:, None].astype(float) - values.astype(np.uint8)[None]) ** 2).mean(-1)
    )
    group = list(range(300))
    for one, other in np.argwhere(distances <= 3):
        first, second = sorted((group[one], group[other]))
        group = [first if of == second else of for of in group]
    expected = [[index for index in range(300) if group[index] == of] for of in sorted(set(group))]
    assert near_duplicates(thumbnails) == [found for found in expected if len(found) > 1]


def test_many_pictures_of_one_kind_take_no_pairs():
    """Frames of a film: every one is near every other."""
    frames = list(np.full((4000, 192), 128, np.uint8))
    assert near_duplicates(frames) == [list(range(4000))]

"""Masks are read, and cropped and averaged with their image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd3tune.data.crops import Crop, cover, cover_size, crops, latent_mask, pixels
from sd3tune.data.images import read_picture
from sd3tune.data.masks import Mask, check_mask_size, read_mask
from sd3tune.errors import DataError


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("flip", [False, True])
def test_a_latent_position_is_the_mean_of_its_pixels(flip: bool) -> None:
    """Independently in float64, at the image's own scale, where nothing is resampled."""
    grey = noise((48, 40))
    crop = Crop((48, 32), (5, 0, 37, 48), flip)
    part = grey[:, 5:37].astype(np.float64) / 255
    part = part[:, ::-1] if flip else part
    expected = [[part[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean() for x in range(4)] for y in range(6)]
    found = latent_mask(Image.fromarray(grey), (48, 40), crop)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_a_mask_lies_on_its_picture_in_every_crop_and_flip(scale: int) -> None:
    """A picture that is its own mask, in blocks that survive scaling; the mask may be larger than the picture."""
    blocks = np.kron(noise((6, 12)), np.ones((16, 16), np.uint8))
    picture = Image.fromarray(blocks).convert("RGB")
    mask = Image.fromarray(np.kron(blocks, np.ones((scale, scale), np.uint8)))
    size = (picture.height, picture.width)
    for crop in crops(size, (96, 64), variants=4, flip=True, digest="ab"):
        seen = (pixels(cover(picture, crop.size), crop)[0, 0] + 1) / 2
        means = seen.reshape(12, 8, 8, 8).mean((1, 3))
        found = latent_mask(mask, cover_size(size, crop.size), crop)
        inside = slice(1, -1)  # the resampling of a block's border differs by filter
        assert (found - means).abs()[inside, inside].max() < (1e-6 if scale == 1 else 0.1)


def test_the_alpha_channel_is_turned_with_its_image(tmp_path: Path) -> None:
    alpha = noise((10, 16))
    image = Image.merge(
        "RGBA", [Image.fromarray(noise((10, 16), band)) for band in (1, 2, 3)] + [Image.fromarray(alpha)]
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.webp", lossless=True, exact=True, exif=exif)
    grey, digest = read_mask(Mask(tmp_path / "a.webp", is_alpha=True))
    assert np.array_equal(np.asarray(grey), np.rot90(alpha, -1))
    assert digest == read_picture(tmp_path / "a.webp").digest


@pytest.mark.parametrize("value", [0, 20], ids=["black", "map-of-classes"])
def test_a_mask_without_an_inside_is_refused(tmp_path: Path, value: int) -> None:
    Image.new("L", (8, 8), value).save(tmp_path / "dog_mask.png")
    with pytest.raises(DataError) as caught:
        read_mask(Mask(tmp_path / "dog_mask.png"))
    assert list(caught.value.problems) == [
        f"{tmp_path / 'dog_mask.png'}: the mask has no inside, its brightest value is {value} of 255; paint the "
        "subject white, or delete the mask"
    ]
    Image.new("RGBA", (8, 8), (255, 255, 255, value)).save(tmp_path / "dog.png")
    with pytest.raises(DataError, match=r"dog.png: its alpha channel: the mask has no inside, .* make some of the"):
        read_mask(Mask(tmp_path / "dog.png", is_alpha=True))


def test_a_transparent_mask_is_refused(tmp_path: Path) -> None:
    """On white, as images are read, it would be white everywhere."""
    Image.new("RGBA", (8, 8), (255, 255, 255, 9)).save(tmp_path / "a_mask.png")
    with pytest.raises(DataError, match=r"a_mask.png: the mask is transparent; save it without transparency, white"):
        read_mask(Mask(tmp_path / "a_mask.png"))


@pytest.mark.parametrize("kind", ["1", "L", "RGB", "P", "I;16"])
def test_masks_of_any_mode_are_white_inside(tmp_path: Path, kind: str) -> None:
    white = {"1": 1, "L": 255, "RGB": (255, 255, 255), "P": 0, "I;16": 65535}
    image = Image.new(kind, (4, 4), white[kind])
    if kind == "P":
        image.putpalette([255, 255, 255])
    image.save(tmp_path / "a.png")
    assert np.asarray(read_mask(Mask(tmp_path / "a.png"))[0]).tolist() == [[255] * 4] * 4


@pytest.mark.parametrize(
    ("mask", "image", "fits"),
    [
        ((600, 800), (600, 800), True),
        ((300, 400), (601, 801), True),
        ((1200, 1601), (600, 800), True),
        ((64, 64), (1000, 1010), True),
        ((512, 512), (600, 800), False),
        ((800, 600), (600, 800), False),
    ],
)
def test_a_mask_has_the_shape_of_its_image(mask: tuple[int, int], image: tuple[int, int], fits: bool) -> None:
    def check() -> None:
        check_mask_size(Mask(Path("masks/dog.png")), mask, Path("photos/dog.jpg"), image)

    if fits:
        check()
        return
    with pytest.raises(DataError) as caught:
        check()
    assert list(caught.value.problems) == [
        f"masks/dog.png: the mask is {mask[1]} x {mask[0]} px and dog.jpg {image[1]} x {image[0]} px; give both the "
        "same shape"
    ]

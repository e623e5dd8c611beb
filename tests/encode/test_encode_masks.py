"""Masks in the store: cropped and flipped with their pictures, and encoded again only when something changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd3tune.data.masks import Mask
from sd3tune.data.records import Record
from sd3tune.data.store import Store
from sd3tune.encode import images
from sd3tune.encode.images import encode_images
from sd3tune.errors import DataError

BUCKETS = [(64, 64), (48, 80), (80, 48)]
SIZES = [(64, 64), (64, 120), (144, 64)]


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Photos of several shapes that are their own masks, in blocks of 8 pixels; the last has no mask."""
    found = []
    for number, size in enumerate([*SIZES, (64, 64)]):
        rng = np.random.default_rng(number)
        blocks = rng.integers(0, 256, (size[0] // 8, size[1] // 8), dtype=np.uint8)
        grey = Image.fromarray(np.kron(blocks, np.ones((8, 8), np.uint8)))
        grey.convert("RGB").save(tmp_path / f"{number}.png")
        grey.save(tmp_path / f"{number}_mask.png")
        mask = Mask(tmp_path / f"{number}_mask.png") if number < len(SIZES) else None
        found.append(Record(tmp_path / f"{number}.png", "a photo", 1, 0, mask=mask))
    return found


@pytest.fixture
def encode(base, tmp_path: Path):
    def encode(records: list[Record], name: str = "store", **more):
        store = Store(tmp_path / name)
        options = {"buckets": BUCKETS, "crop_variants": 3, "flip": True, "dtype": torch.float32, **more}
        encoded, _ = encode_images(base, records, store, **options)
        store.refresh()
        return encoded, store

    return encode


def test_each_variant_of_a_photo_has_the_mask_of_its_own_crop_and_flip(records, encode, monkeypatch) -> None:
    """The VAE is replaced by a mean over latent positions, so that the latents of a photo show its crop."""

    def means(vae: object, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = torch.nn.functional.avg_pool2d((pixels + 1) / 2, 8)
        return pooled, torch.zeros_like(pooled)

    monkeypatch.setattr(images, "encode_moments", means)
    encoded, store = encode(records)
    assert encoded[-1].masks == ()
    for image in encoded[:-1]:
        assert len(image.masks) == len(image.keys) == 6
        latents = [store.get(key)["mean"][0] for key in image.keys]
        masks = [store.get(key)["mask"] for key in image.masks]
        for place, mask in enumerate(masks):
            errors = torch.stack([(mask - latent).abs().mean() for latent in latents])
            assert mask.shape == latents[place].shape
            assert errors[place] < 0.02
            others = [error for error, key in zip(errors, image.keys, strict=True) if key != image.keys[place]]
            assert all(error > 0.05 for error in others)


def test_entries_of_photos_do_not_depend_on_masks(records, encode) -> None:
    """So a store of an earlier version stays in use, and a changed mask encodes no photo again."""
    plain = [Record(record.image, record.caption, 1, 0) for record in records]
    without, before = encode(plain)
    masked, after = encode(records)
    assert [image.keys for image in masked] == [image.keys for image in without]
    for image in without:
        for key in image.keys:
            assert all(torch.equal(before.get(key)[part], after.get(key)[part]) for part in ("mean", "std"))
    count = len(after)
    said: list[str] = []
    encode(records, say=said.append)
    assert said == []
    grey = Image.open(records[0].mask.image).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    grey.save(records[0].mask.image)
    changed, store = encode(records, say=said.append)
    assert [line.partition(",")[0] for line in said] == ["masks: 2 entries to encode"]  # its crops coincide
    assert len(store) == count + 2
    assert [image.keys for image in changed] == [image.keys for image in masked]
    assert [a.masks == b.masks for a, b in zip(changed, masked, strict=True)] == [False, True, True, True]


def test_ranks_divide_the_masks(records, encode) -> None:
    whole, one = encode(records)
    for rank in (0, 1):
        halves, other = encode(records, name="ranks", rank=rank, world=2)
    assert halves == whole
    for image in whole:
        assert all(torch.equal(one.get(key)["mask"], other.get(key)["mask"]) for key in image.masks)


def test_all_masks_that_cannot_be_used_are_named_before_the_vae_is_loaded(records, encode, monkeypatch) -> None:
    monkeypatch.setattr(images, "load_vae", lambda *arguments: pytest.fail("loaded"))
    for record in records[:2]:
        Image.new("L", (9, 80), 255).save(record.mask.image)
    with pytest.raises(DataError) as caught:
        encode(records)
    said = caught.value.problems
    assert [f"{number}_mask.png: the mask is 9 x 80 px" in line for number, line in enumerate(said)] == [True] * 2
    for number, record in enumerate(records[:3]):
        Image.new("L", SIZES[number][::-1]).save(record.mask.image)
    with pytest.raises(DataError) as caught:
        encode(records)
    said = caught.value.problems
    assert [f"{number}_mask.png: the mask has no inside" in line for number, line in enumerate(said)] == [True] * 3


def test_an_image_without_transparency_has_no_alpha_channel_as_its_mask(tmp_path: Path, encode) -> None:
    half = Image.new("RGBA", (64, 64), (10, 20, 30, 255))
    half.save(tmp_path / "opaque.png")
    half.paste((10, 20, 30, 0), (0, 0, 64, 32))
    half.save(tmp_path / "half.png")
    records = [
        Record(path, "a", 1, 0, mask=Mask(path, is_alpha=True))
        for path in (tmp_path / "opaque.png", tmp_path / "half.png")
    ]
    (opaque, transparent), store = encode(records, crop_variants=1, flip=False)
    assert opaque.masks == ()
    expected = torch.cat([torch.zeros(4, 8), torch.ones(4, 8)])
    assert torch.equal(store.get(transparent.masks[0])["mask"], expected)

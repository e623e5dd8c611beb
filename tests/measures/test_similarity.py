"""Similarities against numpy in float64, with loops in place of matrix products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sd3tune.measures.similarity import (
    copied,
    diversity,
    fidelity,
    moved,
    nearest,
    nearest_by_pixels,
    photos_among_themselves,
    prompt_fidelity,
)


def features(count: int, seed: int, size: int = 24) -> Tensor:
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1).float()


def cosine(first: Tensor, second: Tensor) -> float:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return float(sum(a * b) / np.sqrt(sum(a * a) * sum(b * b)))


PICTURES, PHOTOS = features(7, 0), features(4, 1)


def test_fidelity_is_the_mean_cosine_to_the_photos() -> None:
    expected = [np.mean([cosine(picture, photo) for photo in PHOTOS]) for picture in PICTURES]
    found = fidelity(PICTURES, PHOTOS)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_photos_among_themselves_leave_out_the_photo_itself() -> None:
    expected = [np.mean([cosine(PHOTOS[i], PHOTOS[j]) for j in range(4) if j != i]) for i in range(4)]
    np.testing.assert_allclose(photos_among_themselves(PHOTOS), expected, atol=1e-6)


def test_prompt_fidelity_pairs_each_picture_with_its_prompt() -> None:
    texts = features(7, 2)
    expected = [cosine(picture, text) for picture, text in zip(PICTURES, texts, strict=True)]
    np.testing.assert_allclose(prompt_fidelity(PICTURES, texts), expected, atol=1e-6)
    np.testing.assert_allclose(moved(PICTURES, texts), 1 - np.array(expected), atol=1e-6)


def test_diversity_is_one_minus_the_mean_pairwise_cosine() -> None:
    pairs = [cosine(PHOTOS[i], PHOTOS[j]) for i in range(4) for j in range(i)]
    assert diversity(PHOTOS) == pytest.approx(1 - np.mean(pairs), abs=1e-6)
    assert diversity(PHOTOS[:1].expand(3, -1)) == pytest.approx(0, abs=1e-6)


def test_nearest_gives_the_photo_and_its_cosine() -> None:
    table = np.array([[cosine(picture, photo) for photo in PHOTOS] for picture in PICTURES])
    similarity, index = nearest(PICTURES, PHOTOS)
    np.testing.assert_allclose(similarity, table.max(axis=1), atol=1e-6)
    np.testing.assert_array_equal(index, table.argmax(axis=1))


def test_a_copy_is_less_than_half_as_far_from_one_photo_as_from_the_others() -> None:
    """Pictures on the way from one photo to another one, also where a third photo is almost equal to the first."""
    way = torch.linspace(0, 0.5, 21, dtype=torch.float64)[:, None]
    pictures = torch.nn.functional.normalize((1 - way) * PHOTOS[0].double() + way * PHOTOS[1].double(), dim=1)
    for photos in (PHOTOS, torch.cat([PHOTOS, torch.nn.functional.normalize(PHOTOS[:1] + 1e-3, dim=1)])):
        distances = [
            sorted(np.linalg.norm(np.asarray(one) - np.asarray(photos, np.float64), axis=1)) for one in pictures
        ]
        expected = [nearest < 0.5 * np.median(others) for nearest, *others in distances]
        assert copied(pictures, photos).tolist() == expected
        assert expected[0]
        assert not expected[-1]


def test_photos_far_apart_make_no_copies_of_pictures_between_them() -> None:
    photos = torch.eye(4)
    between = torch.nn.functional.normalize(photos[:1] + photos[1:], dim=1)
    assert not copied(between, photos).any()


def test_the_order_of_pictures_and_photos_changes_nothing() -> None:
    order, other = torch.tensor([3, 6, 0, 2, 5, 1, 4]), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(fidelity(PICTURES[order], PHOTOS[other]), fidelity(PICTURES, PHOTOS)[order], atol=1e-7)
    found, index = nearest(PICTURES[order], PHOTOS[other])
    assert torch.equal(other[index], nearest(PICTURES, PHOTOS)[1][order])
    assert torch.equal(found, nearest(PICTURES, PHOTOS)[0][order])
    assert diversity(PHOTOS[other]) == pytest.approx(diversity(PHOTOS), abs=1e-7)


def test_one_photo_has_no_ceiling() -> None:
    for measure in (photos_among_themselves, diversity):
        with pytest.raises(ValueError, match=r"^1 (photos|pictures): at least two"):
            measure(PHOTOS[:1])


@pytest.mark.parametrize(
    ("first", "second"), [(PICTURES, features(4, 1, 8)), (PICTURES[:0], PHOTOS), (PHOTOS[0], PHOTOS)]
)
def test_features_that_do_not_fit_are_refused(first: Tensor, second: Tensor) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        fidelity(first, second)


def test_each_picture_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="7 pictures and 4 texts"):
        prompt_fidelity(PICTURES, PHOTOS)


def test_the_nearest_photo_by_pixels_is_the_one_with_the_least_mean_square() -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(one) for one in values]
    noisy = np.clip(values[3].astype(int) + 10, 0, 255).astype(np.uint8)
    difference, index = nearest_by_pixels([Image.fromarray(noisy), images[1]], images)
    assert index.tolist() == [3, 1]
    scaled = (noisy.astype(np.float64) - values[3]) / 255
    np.testing.assert_allclose(difference, [np.sqrt(np.mean(scaled**2)), 0], atol=1e-6)


def test_black_and_white_differ_by_one_whatever_their_sizes_and_modes() -> None:
    difference, _ = nearest_by_pixels([Image.new("L", (30, 50), 0)], [Image.new("RGBA", (200, 70), "white")])
    assert difference.item() == pytest.approx(1)


def test_the_same_picture_in_another_size_is_the_same_in_pixels() -> None:
    photo = Image.linear_gradient("L").resize((256, 256))
    difference, _ = nearest_by_pixels([photo.resize((512, 512), Image.Resampling.BICUBIC)], [photo])
    assert difference.item() < 0.01

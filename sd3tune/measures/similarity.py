"""Measures of pictures as cosines between features, and one of pixels.

Features are unit length, [n, d] fp32, as encoders give them (see `measures.encoders`), and so is every result, on the
CPU. A cosine is then a product. Fidelity and prompt fidelity are the DINO, CLIP-I and CLIP-T of Ruiz et al. 2023,
*DreamBooth*, section 4.2 (arXiv:2208.12242).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

COPY = 0.5
"""Largest distance of a copy to its photo: a share of its distance to the other photos.

On 40 photos of 8 subjects it told photos that were left out from copies; see benchmarks/README.md, "Measures".
"""


def fidelity(pictures: Tensor, photos: Tensor) -> Tensor:
    """Return each picture's mean cosine to the photos: [n, d], [m, d] -> [n].

    The mean over the pictures is the DINO or CLIP-I of the paper: "the average pairwise cosine similarity between
    embeddings of generated and real images".
    """
    _check(pictures, photos)
    return (pictures.double() @ photos.double().T).mean(dim=1).float()


def photos_among_themselves(photos: Tensor) -> Tensor:
    """Return each photo's mean cosine to the other photos: [m, d] -> [m], the ceiling of fidelity.

    Raises ValueError for fewer than two photos.
    """
    return _to_others(photos, "photos")


def prompt_fidelity(pictures: Tensor, texts: Tensor) -> Tensor:
    """Return each picture's cosine to its own prompt, CLIP-T in the paper: [n, d], [n, d] -> [n]."""
    _check(pictures, texts)
    if len(pictures) != len(texts):
        raise ValueError(f"{len(pictures)} pictures and {len(texts)} texts: each picture needs its own")
    return (pictures.double() * texts.double()).sum(dim=1).float()


def diversity(same_prompt: Tensor) -> float:
    """Return 1 - the mean pairwise cosine of the pictures of one prompt, [s, d]; 0 if all are equal.

    Raises ValueError for fewer than two pictures.
    """
    return 1 - float(_to_others(same_prompt, "pictures").double().mean())


def moved(with_adapter: Tensor, base: Tensor) -> Tensor:
    """Return 1 - cosine between pictures of the same prompt and seed: [n, d], [n, d] -> [n]; 0 if nothing moved."""
    return 1 - prompt_fidelity(with_adapter, base)


def nearest(pictures: Tensor, photos: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine to the nearest photo, and the photo's index: [n, d], [m, d] -> [n] fp32, [n] int64."""
    _check(pictures, photos)
    best = (pictures.double() @ photos.double().T).max(dim=1)
    return best.values.float(), best.indices


def copied(pictures: Tensor, photos: Tensor) -> Tensor:
    """Return True for pictures that copy a photo: [n, d], [m, d] -> [n].

    Such a picture is less than half as far from its nearest photo as from the others: the distance, |a - b|, is less
    than `COPY` times the median distance to the other photos. So neither photos that are far apart, nor two that are
    almost equal, decide alone. Raises ValueError for fewer than two photos.
    """
    _check(pictures, photos)
    _several(photos, "photos")
    distances = (2 - 2 * pictures.double() @ photos.double().T).clamp(min=0).sqrt().sort(dim=1).values
    return distances[:, 0] < COPY * distances[:, 1:].quantile(0.5, dim=1)


def nearest_by_pixels(
    pictures: Sequence[Image.Image], photos: Sequence[Image.Image], side: int = 64
) -> tuple[Tensor, Tensor]:
    """Return the difference to the nearest photo in pixels, and its index: [n] fp32, [n] int64.

    Each image is cropped to its central square and scaled to `side` pixels. The difference is the root mean square over
    RGB values in 0..1: 0 for equal images, 1 for black and white.
    """
    first, second = (torch.stack([_small(image, side) for image in images]) for images in (pictures, photos))
    best = (torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist") / first.shape[1] ** 0.5).min(dim=1)
    return best.values.float(), best.indices


def _small(image: Image.Image, side: int) -> Tensor:
    scaled = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(scaled, np.float64)).flatten() / 255


def _to_others(features: Tensor, name: str) -> Tensor:
    """Return each row's mean cosine to the other rows: [n, d] -> [n]."""
    _several(features, name)
    cosines = features.double() @ features.double().T
    return (cosines.fill_diagonal_(0).sum(dim=1) / (len(features) - 1)).float()


def _several(features: Tensor, name: str) -> None:
    if len(features) < 2:
        raise ValueError(f"{len(features)} {name}: at least two are needed to compare them with each other")


def _check(first: Tensor, second: Tensor) -> None:
    """Raise ValueError for features of different encoders, or none."""
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or 0 in (*first.shape, *second.shape):
        raise ValueError(f"features of shapes {list(first.shape)} and {list(second.shape)} cannot be compared")

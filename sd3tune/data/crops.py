"""Crop an upright image, scaled to cover the target, into a tensor in [-1, 1]. Sizes are (height, width)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from sd3tune.data.seeds import derive

LATENT_SIDE = 8
"""Side of a latent position in pixels."""


@dataclass(frozen=True)
class Crop:
    """A crop of an image scaled to cover `size`; `box` is (left, top, right, bottom) in the scaled image."""

    size: tuple[int, int]
    box: tuple[int, int, int, int]
    flip: bool


def crops(image_size: tuple[int, int], target: tuple[int, int], variants: int, flip: bool, digest: str) -> list[Crop]:
    """Return the crops of one image: variant 0 is centred, others are random; `flip` adds a mirrored copy of each.

    The result depends only on the arguments: `digest`, the SHA-256 of the file, seeds the positions. The list has
    `variants * (1 + flip)` entries; if the image has `target`'s aspect ratio, its crops coincide. A longer list begins
    with the shorter one, so raising `variants` encodes only the new crops.
    """
    height, width = target
    spare_y, spare_x = (a - b for a, b in zip(cover_size(image_size, target), target, strict=True))
    found = []
    for variant in range(variants):
        if variant == 0:
            top, left = spare_y // 2, spare_x // 2
        else:
            top = derive(int(digest, 16), "crop top", variant) % (spare_y + 1)
            left = derive(int(digest, 16), "crop left", variant) % (spare_x + 1)
        box = (left, top, left + width, top + height)
        found += [Crop(target, box, mirrored) for mirrored in ((False, True) if flip else (False,))]
    return found


def cover_size(image_size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the size of an image that is scaled to just cover `target`."""
    (height, width), scale = image_size, max(target[0] / image_size[0], target[1] / image_size[1])
    return max(target[0], round(height * scale)), max(target[1], round(width * scale))


def cover(
    image: Image.Image, target: tuple[int, int], interpolation: InterpolationMode = InterpolationMode.LANCZOS
) -> Image.Image:
    """Return the image scaled to just cover `target`, with its aspect ratio kept."""
    height, width = cover_size((image.height, image.width), target)
    scaled: Image.Image = transforms.resize(image, [height, width], interpolation)
    return scaled


def cut(image: Image.Image, crop: Crop, interpolation: InterpolationMode = InterpolationMode.LANCZOS) -> Image.Image:
    """Return the crop as a picture; `image` may already be scaled by `cover`."""
    left, top, _, _ = crop.box
    part: Image.Image = transforms.crop(cover(image, crop.size, interpolation), top, left, *crop.size)
    return transforms.horizontal_flip(part) if crop.flip else part


def pixels(image: Image.Image, crop: Crop) -> torch.Tensor:
    """Return the crop as fp32 [1, 3, h, w] in [-1, 1], bit-equal to `VaeImageProcessor` of diffusers.

    The memory layout is the same too, channels last, as convolutions round differently in another. `image` may already
    be scaled by `cover`, to avoid scaling it for every crop.
    """
    scaled = np.array(cut(image, crop))[None].astype(np.float32) / 255.0
    return 2.0 * torch.from_numpy(scaled.transpose(0, 3, 1, 2)) - 1.0


def latent_mask(mask: Image.Image, scaled: tuple[int, int], crop: Crop) -> torch.Tensor:
    """Return the share of each latent position of a crop that is inside the mask: fp32 [h / 8, w / 8] in [0, 1].

    `mask` is grey, white inside. `scaled` is the size of the image that just covers the crop; the mask is scaled to it.
    """
    whole = transforms.resize(mask, list(scaled), InterpolationMode.BILINEAR)
    part = np.array(cut(whole, crop, InterpolationMode.BILINEAR), dtype=np.int64)
    height, width = (side // LATENT_SIDE for side in crop.size)
    sums = torch.from_numpy(part).reshape(height, LATENT_SIDE, width, LATENT_SIDE).sum((1, 3))
    return (sums.double() / (255 * LATENT_SIDE**2)).float()


def mask_bytes(size: tuple[int, int]) -> int:
    """Return the bytes of the latent mask of a crop."""
    return 4 * (size[0] // LATENT_SIDE) * (size[1] // LATENT_SIDE)

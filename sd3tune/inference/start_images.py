"""Start images and masks: upright, scaled and cropped to the requested size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode

from sd3tune.data.crops import Crop, crops, cut, pixels
from sd3tune.data.images import read_image


def fitted(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """Return the centre of the picture, scaled to just cover (width, height): fp32 [1, 3, h, w] in [-1, 1].

    Applies the EXIF rotation, and composites transparency on white. Raises DataError.
    """
    image, crop = _centred(path, size)
    return pixels(image, crop)


def fitted_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """Return the centre of a mask in grey, like `fitted`: 255 where the picture is redrawn, 0 where it is kept."""
    image, crop = _centred(path, size)
    return cut(image, crop, InterpolationMode.BILINEAR).convert("L")


def latent_mask(mask: Image.Image, latent_side: int = 8) -> torch.Tensor:
    """Return [1, 1, h / 8, w / 8] fp32: 1 for each latent position with a pixel that is not kept, otherwise 0."""
    redrawn = torch.from_numpy(np.array(mask) > 0).float()
    return torch.nn.functional.max_pool2d(redrawn[None, None], latent_side)


def pasted(drawn: Image.Image, path: Path, mask: Image.Image) -> Image.Image:
    """Return `drawn` with the pixels of the picture `path` where the mask is 0; grey values blend both."""
    image, crop = _centred(path, drawn.size)
    result = Image.composite(drawn, cut(image, crop), mask)
    result.info.update(drawn.info)
    return result


def _centred(path: Path, size: tuple[int, int]) -> tuple[Image.Image, Crop]:
    image, digest = read_image(path)
    width, height = size
    (crop,) = crops((image.height, image.width), (height, width), variants=1, flip=False, digest=digest)
    return image, crop

"""Start images: upright, scaled and cropped to the requested size."""

from __future__ import annotations

from pathlib import Path

import torch

from sd3tune.data.crops import crops, pixels
from sd3tune.data.images import read_image


def fitted(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """Return the centre of the picture, scaled to just cover (width, height): fp32 [1, 3, h, w] in [-1, 1].

    Applies the EXIF rotation, and composites transparency on white. Raises DataError.
    """
    image, digest = read_image(path)
    width, height = size
    (crop,) = crops((image.height, image.width), (height, width), variants=1, flip=False, digest=digest)
    return pixels(image, crop)

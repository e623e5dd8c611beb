"""Pictures to start from: upright, scaled and cut to the size that is drawn."""

from __future__ import annotations

from pathlib import Path

import torch

from sd3tune.data.crops import crops, pixels
from sd3tune.data.images import read_image


def fitted(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """The middle of the picture, scaled until it just covers (width, height): fp32 [1, 3, h, w] in [-1, 1].

    Rotation by EXIF is applied, transparency laid on white. Raises DataError.
    """
    image, digest = read_image(path)
    width, height = size
    (crop,) = crops((image.height, image.width), (height, width), variants=1, flip=False, digest=digest)
    return pixels(image, crop)

"""Names of colours, by perceived similarity."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd3tune.nano.world import COLOURS

Pixels = NDArray[np.floating[Any]]


def median(colours: Pixels) -> Pixels:
    """Return the median of each channel, (3,), of colours (n, 3)."""
    middle: Pixels = np.median(colours, axis=0)
    return middle


def nearest_colour(colour: Pixels) -> str:
    """Return the name in COLOURS that is nearest in Oklab to an RGB colour of 0 to 255."""
    return list(COLOURS)[int(nearest(colour))]


def nearest(colours: Pixels) -> NDArray[np.intp]:
    """Return the indices (...) of the nearest named colours of `colours` (..., 3)."""
    apart = oklab(colours)[..., None, :] - _palette()
    return np.linalg.norm(apart, axis=-1).argmin(axis=-1)


@functools.cache
def _palette() -> Pixels:
    return oklab(np.array(list(COLOURS.values()), np.float32))


def oklab(rgb: Pixels) -> Pixels:
    """Convert sRGB colours (..., 3) of 0 to 255 to Oklab (Ottosson 2020), where equal distances look equal."""
    scaled = rgb / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    lab: Pixels = np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_LAB.T
    return lab


_RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LMS_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)

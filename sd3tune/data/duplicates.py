"""Near-duplicates: images that are scaled, compressed again, or saved in another format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

_SIDE = 8
LEAST_SIDE = 32 * _SIDE
"""Pixels of a picture that is decoded for its thumbnail alone: so that a cut block at its edge shifts it by a 32nd of
a thumbnail's pixel at most."""
_NEAR = 3.0
"""Limit on the root mean square difference of thumbnails, in levels of 255. Rescaling and JPEG at quality 20 cause at
most 2; different photographs of one object on one background differ by more than 6."""
_BLOCK = 256
_ROUNDING = 0.01
"""Rounding error of means in fp32, in levels."""


def thumbnail(image: Image.Image) -> np.ndarray:
    """Return the RGB image averaged to 8 x 8 pixels: uint8 [192]."""
    return np.frombuffer(image.resize((_SIDE, _SIDE), Image.Resampling.BOX).tobytes(), np.uint8)


def near_duplicates(thumbnails: Sequence[np.ndarray]) -> list[list[int]]:
    """Return groups of two or more indices of near-duplicates.

    The difference of two means is at most the difference of the thumbnails. So a thumbnail is compared only with those
    of similar brightness, by |a|^2 + |b|^2 - 2ab, a block of rows at a time.
    """
    if len(thumbnails) < 2:
        return []
    values = np.stack(thumbnails).astype(np.float32) - 128
    order = np.argsort(values.mean(axis=1), kind="stable")
    values = values[order]
    squares, means = (values**2).sum(axis=1), values.mean(axis=1)
    group = np.arange(len(values))  # the smallest index in each thumbnail's group
    for begin in range(0, len(values), _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        near = slice(begin, np.searchsorted(means, means[rows][-1] + _NEAR + _ROUNDING, "right"))
        distances = squares[rows, None] + squares[None, near] - 2 * values[rows] @ values[near].T
        close = np.triu(distances <= _NEAR**2 * values.shape[1], k=1)
        for row in np.flatnonzero(close.any(axis=1)):
            groups = np.unique(group[order[begin + np.flatnonzero(close[row])]])
            groups = np.union1d(groups, group[order[begin + row]])
            if len(groups) > 1:
                group[np.isin(group, groups)] = groups[0]
    _, first, counts = np.unique(group, return_index=True, return_counts=True)
    return [np.flatnonzero(group == group[index]).tolist() for index in first[counts > 1]]

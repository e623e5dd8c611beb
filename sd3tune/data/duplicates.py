"""Pictures that are nearly the same: one scaled, compressed anew, or saved in another format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

_SIDE = 8
_NEAR = 3.0
"""Root mean square difference of thumbnails, of 255 levels. Rescaling and JPEG at quality 20 make at most 2; different
photographs of one thing on one background are beyond 6."""
_BLOCK = 1024


def thumbnail(image: Image.Image) -> np.ndarray:
    """The RGB picture in 8 x 8 pixels, each the mean of its area: uint8 [192]."""
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX)).reshape(-1)


def near_duplicates(thumbnails: Sequence[np.ndarray]) -> list[list[int]]:
    """Groups, two or more each, of the indices of pictures that are nearly the same."""
    group = list(range(len(thumbnails)))

    def root(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = group[index]
        return index

    for one, other in _near_pairs(thumbnails):
        first, second = sorted((root(one), root(other)))
        group[second] = first
    members: dict[int, list[int]] = {}
    for index in range(len(thumbnails)):
        members.setdefault(root(index), []).append(index)
    return [found for found in members.values() if len(found) > 1]


def _near_pairs(thumbnails: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """By |a|^2 + |b|^2 - 2ab, a block of rows at a time: some seconds for 20,000 pictures."""
    if len(thumbnails) < 2:
        return []
    values = np.stack(thumbnails).astype(np.float32) - 128
    squares = (values**2).sum(axis=1)
    limit = _NEAR**2 * values.shape[1]
    pairs = []
    for begin in range(0, len(values), _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        distances = squares[rows, None] + squares[None, begin:] - 2 * values[rows] @ values[begin:].T
        ones, others = np.nonzero(np.triu(distances <= limit, k=1))
        pairs += [(begin + int(one), begin + int(other)) for one, other in zip(ones, others, strict=True)]
    return pairs

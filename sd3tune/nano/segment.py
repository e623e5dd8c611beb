"""From a picture to the parts of it that are not background."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sd3tune.nano.colours import Pixels, median

Mask = NDArray[np.bool_]

SIDE = 64
"""Pictures are looked at in this size; all lengths below are its pixels."""

_SMOOTHING = 0.7  # pixels, of a Gaussian: noise must not fray the edges
_BORDER = 3
_NOTICEABLE = (
    32.0  # of 442, the distance from black to white; the faintest pair of this world, yellow and orange, has 65
)
_SPECK = 48  # pixels; the smallest thing of this world has 180
_PINHOLE = 40  # pixels; the smallest ring's hole has 120


@dataclass(frozen=True)
class Patch:
    """A connected part of the picture that is not background."""

    cover: Pixels
    """(SIDE, SIDE), 0 to 1: how much of each pixel belongs to it."""
    core: Mask
    """(SIDE, SIDE): its pixels without the edge, whose pixels are mixtures; all where that would leave next to nothing."""


def looked_at(image: Image.Image) -> Pixels:
    """(SIDE, SIDE, 3), 0 to 255: the picture, smoothed a little."""
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(_SMOOTHING)), np.float32)


def ground(pixels: Pixels) -> Pixels:
    """(3,): the background's colour, the median along the picture's border."""
    inside = np.zeros(pixels.shape[:2], bool)
    inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    return median(pixels[~inside])


def patches(pixels: Pixels, ground: Pixels) -> list[Patch]:
    """What stands before the background, the largest first."""
    away = np.linalg.norm(pixels - ground, axis=-1)
    found = [patch for part in components(away > _NOTICEABLE) for patch in _parted(away, part)]
    return sorted(found, key=lambda patch: -float(patch.cover.sum()))


def components(mask: Mask, smallest: int = _SPECK) -> Iterator[Mask]:
    """The parts of a mask that hang together by pixels' sides, of at least `smallest` pixels."""
    height, width = mask.shape
    fenced = np.zeros((height + 2, width + 2), bool)
    fenced[1:-1, 1:-1] = mask
    left = set(np.flatnonzero(fenced).tolist())
    while left:
        part = [left.pop()]
        for pixel in part:
            for beside in (pixel - 1, pixel + 1, pixel - width - 2, pixel + width + 2):
                if beside in left:
                    left.remove(beside)
                    part.append(beside)
        if len(part) >= smallest:
            found = np.zeros(fenced.size, bool)
            found[part] = True
            yield found.reshape(fenced.shape)[1:-1, 1:-1]


def _parted(away: Pixels, part: Mask) -> Iterator[Patch]:
    """The part, cut where it is half as different from the background as its faintest tone; so blur does not widen it,
    and two things that only their blur connects come apart."""
    contrast = float(np.quantile(away[_core(part)], 0.2))
    cover = np.clip(2 * away / contrast - 0.5, 0, 1)
    for piece in components(part & (away > contrast / 2)):
        whole = _without_pinholes(piece)
        yield Patch(np.where(whole & ~piece, 1, cover * _grown(piece)), _core(whole))


def _core(mask: Mask) -> Mask:
    """The mask without its edge, whose pixels are mixtures; all of it where that leaves next to nothing."""
    inner = ~_grown(~mask)
    return inner if inner.sum() >= _SPECK / 3 else mask


def _grown(mask: Mask) -> Mask:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _without_pinholes(mask: Mask) -> Mask:
    outside = np.zeros_like(mask)
    for part in components(~mask, smallest=_PINHOLE):
        outside |= part
    return ~outside

"""Separate the things in a picture from its background."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sd3tune.nano.colours import Pixels, median, nearest

Mask = NDArray[np.bool_]

SIDE = 64
"""Size to which pictures are scaled; all lengths below are in its pixels."""

_SMOOTHING = 0.7  # pixels, of a Gaussian, against noise at the edges
_BORDER = 3
_NOTICEABLE = 32.0  # of 442, from black to white; the faintest pair of the world, yellow and orange, differs by 65
_SPECK = 48  # pixels; the smallest thing of the world has 180
_FAINTEST = 0.1  # least share of unmixed pixels with a thing's faintest tone
_ENOUGH = 40  # pixels needed to determine colour and pattern
_PINHOLE = 40  # pixels; the smallest ring's hole has 120


@dataclass(frozen=True)
class Patch:
    """A connected part of the picture that is not background."""

    cover: Pixels
    """(SIDE, SIDE), 0 to 1: the share of each pixel that belongs to it."""
    core: Mask
    """(SIDE, SIDE): its pixels without the mixed ones at the edge, or all if too few would remain."""

    @property
    def near(self) -> Mask:
        """(SIDE, SIDE): its pixels and those up to two away."""
        return _grown(_grown(self.cover > 0))


def looked_at(image: Image.Image) -> Pixels:
    """Return the picture, slightly smoothed: (SIDE, SIDE, 3), 0 to 255."""
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(_SMOOTHING)), np.float32)


def ground(pixels: Pixels) -> Pixels:
    """Return the background's colour (3,): the median of the most common colour along the picture's border."""
    inside = np.zeros(pixels.shape[:2], bool)
    inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    border = pixels[~inside]
    names = nearest(border)
    return median(border[names == np.bincount(names).argmax()])


def patches(pixels: Pixels, ground: Pixels) -> list[Patch]:
    """Return the foreground patches, the largest first."""
    away = np.linalg.norm(pixels - ground, axis=-1)
    found = [patch for part in components(away > _NOTICEABLE) for patch in _parted(away, part)]
    return sorted(found, key=lambda patch: -float(patch.cover.sum()))


def components(mask: Mask, smallest: int = _SPECK) -> Iterator[Mask]:
    """Yield the 4-connected components of a mask with at least `smallest` pixels."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    runs = np.cumsum(starts).reshape(mask.shape)  # index of each pixel's run along its row
    touching = mask[1:] & mask[:-1]
    above, below = runs[:-1][touching], runs[1:][touching]
    label = np.arange(runs[-1, -1] + 1)
    while (label[above] != label[below]).any():
        lower = np.minimum(label[above], label[below])
        np.minimum.at(label, label[above], lower)
        np.minimum.at(label, label[below], lower)
        label = label[label]
    labels = np.where(mask, label[runs], 0)
    sizes = np.bincount(labels.ravel())
    yield from (labels == found for found in np.flatnonzero(sizes >= smallest) if found)


def sharpened(cover: Pixels) -> Pixels:
    """Return coverage with steeper edges, which removes blur and noise near 0 and 1."""
    return np.clip(2 * cover - 0.5, 0, 1)


def _parted(away: Pixels, part: Mask) -> Iterator[Patch]:
    """Yield the parts of a patch, cut where it differs from the background by half as much as its faintest tone.

    So blur does not widen a thing, and things that only blur connects are separated.
    """
    contrast = float(np.quantile(away[_core(part)], _FAINTEST))
    cover = sharpened(away / contrast)
    for piece in _bridges_cut(part & (away > contrast / 2)):
        whole = _without_pinholes(piece)
        yield Patch(np.where(whole & ~piece, 1, cover * _grown(piece)), _core(whole))


def _bridges_cut(mask: Mask) -> Iterator[Mask]:
    """Yield the parts of a mask, separated at bridges of two pixels."""
    for part in components(mask):
        stable = list(components(_shrunk(part)))
        yield from [part] if len(stable) < 2 else (_grown(piece) & part for piece in stable)


def _core(mask: Mask) -> Mask:
    once = _shrunk(mask)
    twice = _shrunk(once)
    return next((core for core in (twice, once) if core.sum() >= _ENOUGH), mask)


def _shrunk(mask: Mask) -> Mask:
    return ~_grown(~mask)


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

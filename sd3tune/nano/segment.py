"""Separating the things in a picture from its background."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sd3tune.nano.colours import Pixels, median, nearest

Mask = NDArray[np.bool_]

SIDE = 64
"""Pictures are looked at in this size; all lengths below are its pixels."""

_SMOOTHING = 0.7  # pixels, of a Gaussian: noise must not fray the edges
_BORDER = 3
_NOTICEABLE = 32.0  # of 442, from black to white; the faintest pair of this world, yellow and orange, has 65
_SPECK = 48  # pixels; the smallest thing of this world has 180
_FAINTEST = 0.1  # of the pixels that are no mixtures have a thing's faintest tone at least
_ENOUGH = 40  # pixels, to tell a colour and a pattern from
_PINHOLE = 40  # pixels; the smallest ring's hole has 120


@dataclass(frozen=True)
class Patch:
    """A connected part of the picture that is not background."""

    cover: Pixels
    """(SIDE, SIDE), 0 to 1: how much of each pixel belongs to it."""
    core: Mask
    """(SIDE, SIDE): its pixels without those at the edge, which are mixtures, unless next to none would be left."""


def looked_at(image: Image.Image) -> Pixels:
    """(SIDE, SIDE, 3), 0 to 255: the picture, smoothed a little."""
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(_SMOOTHING)), np.float32)


def ground(pixels: Pixels) -> Pixels:
    """(3,): the background's colour, the median of the commonest colour along the picture's border."""
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
    """The parts of a mask that hang together by pixels' sides, of at least `smallest` pixels."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    runs = np.cumsum(starts).reshape(mask.shape)  # the number of each pixel's run along its row
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
    """Return coverage with steeper edges, without blur and without noise near 0 and 1."""
    return np.clip(2 * cover - 0.5, 0, 1)


def _parted(away: Pixels, part: Mask) -> Iterator[Patch]:
    """The part, cut where it is half as different from the background as its faintest tone; so blur does not widen it,
    and two things that only their blur connects come apart."""
    contrast = float(np.quantile(away[_core(part)], _FAINTEST))
    cover = sharpened(away / contrast)
    for piece in _bridges_cut(part & (away > contrast / 2)):
        whole = _without_pinholes(piece)
        yield Patch(np.where(whole & ~piece, 1, cover * _grown(piece)), _core(whole))


def _bridges_cut(mask: Mask) -> Iterator[Mask]:
    """The parts of a mask, those that only a bridge of two pixels connects apart from each other."""
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

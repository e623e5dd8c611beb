"""Recognise styles, textures and second parts: draw the found figure in each way, and compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from sd3tune.nano.colours import Pixels, median, nearest_colour
from sd3tune.nano.figures import FIGURES
from sd3tune.nano.patterns import base_colour
from sd3tune.nano.segment import SIDE, Patch
from sd3tune.nano.shapes import BLOCKS, STYLED, Placed, paint, pixelated, second_tone
from sd3tune.nano.silhouettes import Outlined
from sd3tune.nano.world import COLOURS, TEXTURES

_EXPLAINED = 0.4  # least share of a plain drawing's error that a pattern must remove
_CONTRAST, _EDGE_CONTRAST = 0.35, 0.6  # least difference of the two tones, as a share of the drawn one
_BLURS = (0.7, 1.0, 1.25, 1.6)  # pixels, of Gaussians: that of `looked_at`, and with a picture's own blur
_BLOCKY = 0.8  # greatest ratio of steps inside blocks to steps between them; without blocks it is about 3
_NOISE, _MISPLACED = 8.0, 0.5  # of 255; pixels
_LIGHT, _DARK = 200, 100  # a grey, and its second tone


@dataclass(frozen=True)
class Surface:
    """What a thing looks like inside its outline."""

    colour: str
    texture: str
    style: str


def is_pixelated(picture: Image.Image) -> bool:
    """Return True if colours change between blocks rather than inside them."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    inside = between = 0.0
    for axis in (0, 1):
        steps = np.abs(np.diff(pixels, axis=axis)).sum(axis=(1 - axis, 2))
        at_edge = np.arange(1, SIDE) % (SIDE // BLOCKS) == 0
        inside, between = inside + float(steps[~at_edge].sum()), between + float(steps[at_edge].sum())
    return inside < _BLOCKY * between


def surface(pixels: Pixels, ground: Pixels, patch: Patch, form: Outlined, blocks: bool) -> Surface | None:
    """Return the surface of a thing; None if the figure's own parts or texture are not there.

    `pixels` (SIDE, SIDE, 3) are slightly smoothed, `ground` (3,) is the background's colour, and `blocks` tells that
    the picture is pixelated.
    """
    figure = FIGURES[form.shape]
    covers = _painted(form, "", "", blocks, bare=True) / _LIGHT
    near = (covers[-1] > 0.02) | (patch.cover > 0)
    apart = float(np.linalg.norm(median(pixels[patch.core]) - ground))
    mixtures = [
        _Mixture(pixels[near] - (1 - cover[near, None]) * ground, _weights(cover, apart)[near]) for cover in covers
    ]
    plain = min((mixture.fit(cover[near]) for mixture, cover in zip(mixtures, covers, strict=True)), key=_error)
    best, least = None, (1 - _EXPLAINED) * plain.error
    for texture, style in _ways(blocks):
        seconds = (_LIGHT * covers - _painted(form, texture, style, blocks)) / (_LIGHT - _DARK)
        of_each_blur = zip(mixtures, covers, seconds, strict=True)
        fit = min(
            (mixture.fit((cover - second)[near], second[near]) for mixture, cover, second in of_each_blur), key=_error
        )
        if fit.error < least and _contrast(fit.tones) > (_EDGE_CONTRAST if style == "outline" else _CONTRAST):
            best = Surface(base_colour(fit.tones), texture, "pixelated" if blocks else style)
            least = fit.error
    if best is None and not (figure.parts or figure.texture):
        return Surface(nearest_colour(plain.tones[0]), "", "pixelated" if blocks else "")
    return best


def _ways(blocks: bool) -> Iterator[tuple[str, str]]:
    """Yield (texture, style) of all surfaces; a pixelated picture has no other style."""
    yield from ((texture, "") for texture in TEXTURES)
    if not blocks:
        yield from (("", style) for style in STYLED)


def _painted(form: Outlined, texture: str, style: str, blocks: bool, bare: bool = False) -> Pixels:
    """Draw the figure light on black, with a dark second tone unless `bare`: (blurs, SIDE, SIDE)."""
    figure = FIGURES[form.shape]
    placed = Placed(
        figure.outline,
        (form.x + 0.5) / SIDE,
        (form.y + 0.5) / SIDE,
        form.radius / SIDE,
        form.angle,
        (_LIGHT, _LIGHT, _LIGHT),
        "" if bare else texture or figure.texture,
        () if bare else figure.parts,
        style,
    )
    picture = paint([placed], (0, 0, 0), SIDE)
    picture = (pixelated(picture) if blocks else picture).getchannel(0)
    return np.stack([np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)), np.float32) for blur in _BLURS])


@dataclass(frozen=True)
class _Fit:
    tones: Pixels
    """(tones, 3)"""
    error: float


def _error(fit: _Fit) -> float:
    return fit.error


@dataclass(frozen=True)
class _Mixture:
    """Colours (n, 3) that are to be mixed from tones, and the weight of each, (n,)."""

    colours: Pixels
    weights: Pixels

    def fit(self, *shares: Pixels) -> _Fit:
        """Return the tones that fit best, and the weighted squared error; `shares` are those of each tone, (n,)."""
        mixed = np.stack(shares, axis=1) * self.weights[:, None]
        wanted = self.colours * self.weights[:, None]
        tones, *_ = np.linalg.lstsq(mixed, wanted, rcond=None)
        return _Fit(np.clip(tones, 0, 255), float(np.square(wanted - mixed @ tones).sum()))


def _weights(cover: Pixels, apart: float) -> Pixels:
    """Return the inverse of the error expected in each pixel, from noise and from an edge that lies elsewhere."""
    down, across = np.gradient(cover)
    weights: Pixels = 1 / np.sqrt(_NOISE**2 + (_MISPLACED * apart) ** 2 * (down**2 + across**2))
    return weights


def _contrast(tones: Pixels) -> float:
    """Return the difference of two tones (2, 3) as a share of what would be drawn; negative in the wrong direction."""
    colour = COLOURS[base_colour(tones)]
    drawn = np.array(colour, np.float32) - second_tone(colour)
    return float((tones[0] - tones[1]) @ drawn / (drawn @ drawn))

"""Recognise styles, textures and second parts: draw the found figure in each way, and compare."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from sd3tune.nano.colours import Pixels, median, nearest_colour
from sd3tune.nano.figures import FIGURES
from sd3tune.nano.patterns import base_colour
from sd3tune.nano.segment import SIDE, Mask, Patch
from sd3tune.nano.shapes import BLOCKS, STYLED, Placed, paint, pixelated, second_tone
from sd3tune.nano.silhouettes import Outlined
from sd3tune.nano.world import COLOURS, TEXTURES

_EXPLAINED = 0.4  # least share of a bare drawing's error that a pattern must remove
_SETTLED = 1.0  # squared error per pixel, in units of what is expected, below which the pose needs no refinement
_STEPS = (1.0, 0.5)  # of the refinement; a step of 1 is a pixel, 6 % of the radius, or 4 degrees
_CONTRAST, _EDGE_CONTRAST = 0.35, 0.45  # least difference of the two tones, as a share of the drawn one
_BLURS = (0.7, 1.0, 1.25, 1.6)  # pixels, of Gaussians: that of `looked_at`, and with a picture's own blur
_GRAIN = 25.0  # of 765, the step between neighbours that is no edge; more where the picture is noisy
_SURELY_BLOCKS, _SURELY_NONE = 0.45, 2.2  # ratios of steps inside blocks to steps between them
_BLOCKS_FIT = 2.4  # greatest error of a pixelated drawing of a pixelated thing, relative to the best other drawing
_NOISE, _MISPLACED = 8.0, 0.5  # of 255; pixels
_LIGHT, _DARK = 200, 100  # a grey, and its second tone


Way = tuple[str, str]
"""A texture and a style."""
_PLAIN = ("", "")


@dataclass(frozen=True)
class Surface:
    """What a thing looks like inside its outline."""

    colour: str
    texture: str
    style: str


def blockiness(picture: Image.Image) -> float:
    """Return the ratio of steps inside blocks to steps between them: 0 for a pixelated picture, about 3 for others."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    inside = between = 0.0
    for axis in (0, 1):
        steps = np.abs(np.diff(pixels, axis=axis)).sum(axis=2)
        steps = np.maximum(steps - _GRAIN - 1.2 * np.median(steps), 0).sum(axis=1 - axis)
        at_edge = np.arange(1, SIDE) % (SIDE // BLOCKS) == 0
        inside, between = inside + float(steps[~at_edge].sum()), between + float(steps[at_edge].sum())
    return inside / between if between else math.inf


def is_pixelated(picture: Image.Image, pixels: Pixels, ground: Pixels, patch: Patch, form: Outlined) -> bool:
    """Return True if the picture is pixelated, by its steps or, where these leave it open, by drawings of a thing."""
    ratio = blockiness(picture)
    if not _SURELY_BLOCKS < ratio < _SURELY_NONE:
        return ratio <= _SURELY_BLOCKS
    errors = []
    for blocks in (True, False):
        view = _View(pixels, ground, patch.near, 0.0, blocks)  # edges count in full
        errors.append(min(view.refined(form, way).error for way in _ways(blocks)))
    return errors[0] < _BLOCKS_FIT * errors[1]


def surface(pixels: Pixels, ground: Pixels, patch: Patch, form: Outlined, blocks: bool) -> Surface | None:
    """Return the surface of a thing; None if the figure's own parts or texture are not there.

    `pixels` (SIDE, SIDE, 3) are slightly smoothed, `ground` (3,) is the background's colour, and `blocks` tells that
    the picture is pixelated.
    """
    figure = FIGURES[form.shape]
    view = _View(pixels, ground, patch.near, float(np.linalg.norm(median(pixels[patch.core]) - ground)), blocks)
    fits = {way: view.fit(form, way) for way in _ways(blocks)}
    bare = view.fit(form, None)
    best = min(fits, key=lambda way: fits[way].error)
    if fits[best].error > _SETTLED:
        fits |= {way: view.refined(form, way) for way in {best, _PLAIN}}
        bare = view.refined(form, None)
    has_pattern = bool(figure.parts or figure.texture)
    shown = [
        way
        for way, fit in fits.items()
        if (way != _PLAIN or has_pattern)
        and fit.error < (1 - _EXPLAINED) * bare.error
        and _contrast(fit.tones) > (_EDGE_CONTRAST if way == ("", "outline") else _CONTRAST)
    ]
    if not shown:
        return None if has_pattern else Surface(nearest_colour(bare.tones[0]), "", "pixelated" if blocks else "")
    texture, style = way = min(shown, key=lambda way: fits[way].error)
    return Surface(base_colour(fits[way].tones), texture, "pixelated" if blocks else style)


def _ways(blocks: bool) -> Iterator[Way]:
    """Yield all ways to draw a figure; a pixelated picture has no other style."""
    yield from ((texture, "") for texture in TEXTURES)
    if not blocks:
        yield from (("", style) for style in STYLED)


@dataclass(frozen=True)
class _Fit:
    tones: Pixels
    """(tones, 3)"""
    error: float
    """The mean squared error of a pixel, in units of what is expected."""


@dataclass(frozen=True)
class _View:
    """The pixels around a thing, to which drawings are compared."""

    pixels: Pixels
    ground: Pixels
    near: Mask
    apart: float
    """How far the thing's colour is from the background's; 0 weights edges like other pixels."""
    blocks: bool

    def fit(self, form: Outlined, way: Way | None) -> _Fit:
        """Return the best fit of a drawing over several blurs; None is a figure without parts or texture."""
        covers = _painted(form, None, self.blocks) / _LIGHT
        seconds = None if way is None else (_LIGHT * covers - _painted(form, way, self.blocks)) / (_LIGHT - _DARK)
        fits = []
        for n, cover in enumerate(covers):
            shares = [cover] if seconds is None else [cover - seconds[n], seconds[n]]
            weights = self._weights(cover)
            mixed = np.stack([(share * weights)[self.near] for share in shares], axis=1)
            wanted = ((self.pixels - (1 - cover[..., None]) * self.ground) * weights[..., None])[self.near]
            tones, *_ = np.linalg.lstsq(mixed, wanted, rcond=None)
            error = float(np.square(wanted - mixed @ tones).sum()) / len(wanted)
            fits.append(_Fit(np.clip(tones, 0, 255), error))
        return min(fits, key=lambda fit: fit.error)

    def refined(self, form: Outlined, way: Way | None) -> _Fit:
        """Return the best fit near a form, found by small steps in each direction."""
        fit = self.fit(form, way)
        for step, sign in itertools.product(_STEPS, (1, -1)):
            for moved in (
                replace(form, x=form.x + sign * step),
                replace(form, y=form.y + sign * step),
                replace(form, radius=form.radius * (1 + 0.06 * sign * step)),
                replace(form, angle=form.angle + 4 * sign * step),
            ):
                moved_fit = self.fit(moved, way)
                if moved_fit.error < fit.error:
                    form, fit = moved, moved_fit
        return fit

    def _weights(self, cover: Pixels) -> Pixels:
        """Return the inverse of the error expected in each pixel, from noise and from an edge that lies elsewhere."""
        down, across = np.gradient(cover)
        weights: Pixels = 1 / np.sqrt(_NOISE**2 + (_MISPLACED * self.apart) ** 2 * (down**2 + across**2))
        return weights


def _painted(form: Outlined, way: Way | None, blocks: bool) -> Pixels:
    """Draw the figure light on black, with a dark second tone if it is drawn in a way: (blurs, SIDE, SIDE)."""
    figure = FIGURES[form.shape]
    texture, style = way or _PLAIN
    placed = Placed(
        figure.outline,
        (form.x + 0.5) / SIDE,
        (form.y + 0.5) / SIDE,
        form.radius / SIDE,
        form.angle,
        (_LIGHT, _LIGHT, _LIGHT),
        "" if way is None else texture or figure.texture,
        () if way is None else figure.parts,
        style,
    )
    picture = paint([placed], (0, 0, 0), SIDE)
    picture = (pixelated(picture) if blocks else picture).getchannel(0)
    return np.stack([np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)), np.float32) for blur in _BLURS])


def _contrast(tones: Pixels) -> float:
    """Return the difference of two tones (2, 3) as a share of what would be drawn; negative in the wrong direction."""
    colour = COLOURS[base_colour(tones)]
    drawn = np.array(colour, np.float32) - second_tone(colour)
    return float((tones[0] - tones[1]) @ drawn / (drawn @ drawn))

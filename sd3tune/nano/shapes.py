"""Outlines in the unit circle, y down, and their painting with antialiasing, in several styles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Outline = Sequence[Sequence[tuple[float, float]]]
"""A polygon, and the polygons cut out of it."""

_FINER = 4  # each pixel is the mean of a square of this side


@dataclass(frozen=True)
class Placed:
    """An outline on the picture: centre and radius as fractions of its side, the angle in degrees."""

    outline: Outline
    x: float
    y: float
    radius: float
    angle: float
    colour: Colour
    texture: str = ""
    parts: Outline = ()
    """Polygons in the second tone; only what lies inside the outline shows."""
    style: str = ""
    """One of `STYLED`, or "" for a plain surface."""


def paint(things: Sequence[Placed], background: Colour, side: int) -> Image.Image:
    """Paint the things on the background: an RGB picture of `side` by `side` pixels."""
    fine = side * _FINER
    canvas = Image.new("RGB", (fine, fine), background)
    for thing in things:
        canvas.paste(_surface(thing, fine), (0, 0), _mask(thing, fine))
    return canvas.resize((side, side), Image.Resampling.BOX)


def pixelated(picture: Image.Image) -> Image.Image:
    """Return the picture in `BLOCKS` by `BLOCKS` blocks, each of its mean colour."""
    return picture.resize((BLOCKS, BLOCKS), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)


def _mask(thing: Placed, fine: int) -> Image.Image:
    mask = Image.new("L", (fine, fine), 0)
    draw = ImageDraw.Draw(mask)
    for fill, polygon in zip([255] + [0] * len(thing.outline), _on_canvas(thing, thing.outline, fine), strict=False):
        draw.polygon(polygon, fill=fill)
    return mask


def _on_canvas(thing: Placed, polygons: Outline, fine: int) -> list[list[tuple[float, float]]]:
    """Return polygons of the unit circle where the thing lies, in fine pixels."""
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    return [
        [
            (
                (thing.x + thing.radius * (x * cos - y * sin)) * fine,
                (thing.y + thing.radius * (x * sin + y * cos)) * fine,
            )
            for x, y in polygon
        ]
        for polygon in polygons
    ]


def _surface(thing: Placed, fine: int) -> Image.Image:
    surface = Image.new("RGB", (fine, fine), thing.colour)
    if thing.style == "gradient":
        _gradient(surface, thing, fine)
    draw = ImageDraw.Draw(surface)
    if thing.texture:
        _TEXTURES[thing.texture](draw, thing, fine)
    for polygon in _on_canvas(thing, thing.parts, fine):
        draw.polygon(polygon, fill=second_tone(thing.colour))
    if thing.style in _LINES:
        _LINES[thing.style](draw, thing, fine)
    return surface


def second_tone(colour: Colour) -> Colour:
    """Return the colour of stripes and dots: darker than the thing, or lighter if the thing is black."""
    factor, offset = (0.5, 0.0) if max(colour) > 60 else (1.0, 100.0)
    red, green, blue = (round(factor * channel + offset) for channel in colour)
    return red, green, blue


def _stripes(draw: ImageDraw.ImageDraw, thing: Placed, fine: int) -> None:
    width = 0.075 * fine
    middle = thing.y * fine
    for number in range(-8, 8):
        top = middle + (2 * number + 0.5) * width
        draw.rectangle([0, top, fine, top + width], fill=second_tone(thing.colour))


def _dots(draw: ImageDraw.ImageDraw, thing: Placed, fine: int) -> None:
    apart, radius = 0.16 * fine, 0.047 * fine
    for row in range(-4, 5):
        for column in range(-4, 5):
            x, y = thing.x * fine + column * apart, thing.y * fine + row * apart
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=second_tone(thing.colour))


def _edge(draw: ImageDraw.ImageDraw, thing: Placed, fine: int) -> None:
    """Draw lines along the outline; half of their width lies outside, where it does not show."""
    for polygon in _on_canvas(thing, thing.outline, fine):
        width = round(2 * 0.13 * thing.radius * fine)
        draw.line([*polygon, polygon[0], polygon[1]], fill=second_tone(thing.colour), width=width, joint="curve")


def _hatching(draw: ImageDraw.ImageDraw, thing: Placed, fine: int) -> None:
    """Draw diagonal lines, rising to the right."""
    apart, width = 0.16 * fine, round(0.04 * fine)  # `apart` is measured along a row
    for number in range(-13, 14):
        x, y = thing.x * fine + number * apart, thing.y * fine
        draw.line([(x - fine, y + fine), (x + fine, y - fine)], fill=second_tone(thing.colour), width=width)


def _gradient(surface: Image.Image, thing: Placed, fine: int) -> None:
    """Fill the surface from the thing's colour at its top to the second tone at its bottom."""
    top, height = round((thing.y - thing.radius) * fine), round(2 * thing.radius * fine)
    share = Image.new("L", (1, fine))
    share.putdata([min(255, max(0, round(255 * (row - top) / height))) for row in range(fine)])
    surface.paste(second_tone(thing.colour), (0, 0), share.resize((fine, fine)))


_Drawing = Callable[[ImageDraw.ImageDraw, Placed, int], None]
_TEXTURES: dict[str, _Drawing] = {"striped": _stripes, "dotted": _dots}
_LINES: dict[str, _Drawing] = {"outline": _edge, "hatched": _hatching}
STYLED = (*_LINES, "gradient")
"""The styles of a surface; "pixelated" is one of the whole picture."""
BLOCKS = 16


def _round(radius: float, corners: int = 72) -> list[tuple[float, float]]:
    return _star(radius, radius, corners // 2)


def _star(outer: float, inner: float, points: int) -> list[tuple[float, float]]:
    corners = []
    for n in range(2 * points):
        radius, angle = (inner if n % 2 else outer), math.pi * (n / points - 0.5)
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


def _plus(arm: float, half: float) -> list[tuple[float, float]]:
    quarter = [(-half, -arm), (half, -arm), (half, -half)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


def _heart(corners: int = 90) -> list[tuple[float, float]]:
    """Return the curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled and centred."""
    curve = []
    for n in range(corners):
        t = 2 * math.pi * n / corners
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        curve.append((x / 16, -(y + 2.5) / 16))
    return curve


OUTLINES: dict[str, Outline] = {
    "circle": [_round(0.92)],
    "square": [[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]],
    "triangle": [[(0, -0.95), (0.98, 0.8), (-0.98, 0.8)]],
    "star": [_star(1.1, 0.46, 5)],
    "ring": [_round(1.0), _round(0.56)],
    "cross": [_plus(0.98, 0.32)],
    "heart": [_heart()],
}

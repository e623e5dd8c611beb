"""Contact sheets: images in a labelled grid."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN, _LABEL, _CELL = 8, 28, 52


def contact_sheet(
    images: Sequence[Sequence[Image.Image | None]],
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    side: int = 256,
    cells: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Return one picture of all `images[row][column]`, each fitted into a square of `side` pixels.

    Each column and row has a label above it. Each image has the text `cells[row][column]`, up to three lines, below it.
    """
    wide = max(len(row) for row in images)
    row_height = side + _MARGIN + (_LABEL if rows else 0) + (_CELL if cells else 0)
    top = _LABEL if columns else _MARGIN
    sheet = Image.new("RGB", (_MARGIN + wide * (side + _MARGIN), top + len(images) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for x, label in enumerate(columns):
        draw.text((_MARGIN + x * (side + _MARGIN), 7), _fitted(label, side), fill="black", font=font)
    for y, row in enumerate(images):
        above = top + y * row_height
        if rows:
            draw.text((_MARGIN, above + 4), _fitted(rows[y], wide * (side + _MARGIN)), fill="#444", font=font)
            above += _LABEL
        for x, image in enumerate(row):
            if image is not None:
                fitted = _fit(image, side)
                left = _MARGIN + x * (side + _MARGIN)
                sheet.paste(fitted, (left + (side - fitted.width) // 2, above + (side - fitted.height) // 2))
        for x, label in enumerate(cells[y] if cells else ()):
            lines = textwrap.wrap(label, side // 7, max_lines=3, placeholder="...")
            place = (_MARGIN + x * (side + _MARGIN), above + side + 2)
            draw.multiline_text(place, "\n".join(lines), fill="black", font=font, spacing=2)
    return sheet


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _fitted(label: str, width: int) -> str:
    return textwrap.shorten(label, max(8, width // 7), placeholder="...")

"""The recipe in a PNG: the settings of an image, as JSON in a text chunk, written by `infer` and by previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3tune.files.atomic import new_file
from sd3tune.files.json import parse
from sd3tune.files.regular import open_regular

RECIPE_KEY = "sd3tune"
"""Keyword of the text chunk, and key in the `info` of an image."""
_LONGEST = 2**20
"""Limit on the characters of a recipe; encoders read only a few hundred words of its texts."""


def save_png(image: Image.Image, path: Path, recipe: str) -> None:
    """Write the image with its recipe, under a temporary name first. Raises OSError."""
    info = PngInfo()
    info.add_itxt(RECIPE_KEY, recipe)
    with new_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_recipe(path: Path) -> Any:
    """Return the JSON value in a PNG.

    None for any other file, and for a value that is too long or too deep for a recipe. Does not block on a pipe.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            return parse(image.info.get(RECIPE_KEY, "null"), _LONGEST, plain=False)
    except Exception:  # decoders may raise anything for arbitrary bytes
        return None

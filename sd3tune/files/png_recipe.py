"""The recipe in a PNG: how a picture was drawn, as JSON in a text chunk. `infer` and the previews of runs write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3tune.files.atomic import new_file
from sd3tune.files.json import parse
from sd3tune.files.regular import open_regular

RECIPE_KEY = "sd3tune"
"""The keyword of the text chunk; also the key in the `info` of an image."""
_LONGEST = 2**20
"""Characters of a recipe; its texts are cut off at some hundred words anyway."""


def save_png(image: Image.Image, path: Path, recipe: str) -> None:
    """Write the image with its recipe, under a temporary name first. Raises OSError."""
    info = PngInfo()
    info.add_itxt(RECIPE_KEY, recipe)
    with new_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def read_recipe(path: Path) -> Any:
    """Return the JSON value in a PNG.

    None for any other file, and for a value that is longer or deeper than the recipe of a picture can be. A pipe is not
    waited for.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            return parse(image.info.get(RECIPE_KEY, "null"), _LONGEST, plain=False)
    except Exception:  # decoders of arbitrary bytes raise nearly anything
        return None

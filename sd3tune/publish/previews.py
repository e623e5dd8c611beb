"""Recognition of a run's previews, by their names and recipes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3tune.files.png_recipe import read_recipe

SAMPLES = "samples"
SHEET = "over_time.png"
PREVIEW_NAME = re.compile(r"step-(\d+)-(\d+)\.png")
_BASE_NAME = re.compile(r"base-\d+\.png")
_WEIGHTS = ("raw", "ema")
_LONGEST = 2**20
"""Characters of a recipe; its texts are cut off at some hundred words anyway."""
_TYPES: Mapping[str, tuple[type, ...]] = {
    "prompt": (str,), "steps": (int,), "guidance": (int, float), "seed": (int,),
}  # fmt: skip


def is_preview_name(name: str) -> bool:
    """Return whether a file name is one that runs give to previews or contact sheets."""
    return name == SHEET or any(pattern.fullmatch(name) for pattern in (PREVIEW_NAME, _BASE_NAME))


def preview_recipe(path: Path) -> dict[str, Any] | None:
    """Return the recipe in a preview; None for any other file.

    Its keys are `prompt`, `steps`, `guidance`, `seed`, `weights` and, if set, `noise_offset`, `negative`, `size` and
    `slg`.
    """
    recipe = read_recipe(path)
    if not isinstance(recipe, dict) or recipe.get("weights") not in _WEIGHTS:
        return None
    typed = all(type(recipe.get(name)) in types for name, types in _TYPES.items())
    typed = typed and type(recipe.get("noise_offset", 0.0)) in (int, float) and type(recipe.get("negative", "")) is str
    return recipe if typed and _is_size(recipe.get("size")) and _is_slg(recipe.get("slg")) else None


def guiding_options(recipe: Mapping[str, Any]) -> list[str]:
    """Return the options of `sd3tune infer` for a preview's own settings: `negative`, `size` and `slg`."""
    words = []
    if recipe.get("negative"):
        words += ["--negative", recipe["negative"]]
    if recipe.get("size"):
        words += ["--size", "x".join(map(str, recipe["size"]))]
    if slg := recipe.get("slg"):
        layers = ",".join(map(str, slg["layers"]))
        words += ["--slg", str(slg["scale"]), "--slg-layers", layers]
        words += ["--slg-start", str(slg["start"]), "--slg-stop", str(slg["stop"])]
    return words


def _is_size(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)
    return value is None or whole


def _is_slg(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("layers"), list):
        return False
    numbers = [value.get(name) for name in ("scale", "start", "stop")]
    return all(type(one) in (int, float) for one in numbers) and all(type(layer) is int for layer in value["layers"])


def is_preview(path: Path) -> bool:
    """Return whether a run drew this picture, by its name and recipe."""
    if path.name != SHEET:
        return is_preview_name(path.name) and preview_recipe(path) is not None
    rows = read_recipe(path)  # file names by row, then the prompts
    return isinstance(rows, list) and all(isinstance(row, list | str) for row in rows)

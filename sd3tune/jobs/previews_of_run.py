"""The previews that a run holds, read back from its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sd3tune.jobs.recipes import RECIPE_KEY
from sd3tune.jobs.run_folder import SAMPLES

_SETTINGS = {"prompt", "steps", "guidance", "seed", "weights"}
_NAME = re.compile(r"step-(\d+)-(\d+)\.png")


@dataclass(frozen=True)
class Preview:
    """A picture that the weights of a step drew."""

    path: Path
    step: int
    number: int
    """Of its prompt in `preview.prompts`."""
    recipe: Mapping[str, Any]
    """`prompt`, `steps`, `guidance`, `seed`, `weights` (`raw` or `ema`) and `noise_offset`, where there is one."""


def previews_of(run: Path) -> list[Preview]:
    """All of them by step and number. A file that says nothing of itself is none."""
    named = ((path, _NAME.fullmatch(path.name)) for path in (run / SAMPLES).glob("step-*.png"))
    found = [
        Preview(path, int(name[1]), int(name[2]), recipe)
        for path, name in named
        if name and (recipe := _recipe_in(path)) is not None
    ]
    return sorted(found, key=lambda preview: (preview.step, preview.number))


def _recipe_in(path: Path) -> dict[str, Any] | None:
    try:
        with Image.open(path) as image:
            recipe = json.loads(image.info.get(RECIPE_KEY, "null"))
    except (OSError, ValueError):
        return None
    return recipe if isinstance(recipe, dict) and recipe.keys() >= _SETTINGS else None

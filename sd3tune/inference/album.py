"""Pictures on the disk: each with its recipe inside, none ever overwritten."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3tune.files.atomic import new_file, remove_stale
from sd3tune.inference.grid import Grid
from sd3tune.inference.image_request import Shot
from sd3tune.inference.recipes import Recipes, read_recipe, recipe_key
from sd3tune.publish.previews import RECIPE_KEY
from sd3tune.reporting import say
from sd3tune.sampling.contact_sheet import contact_sheet
from sd3tune.sampling.sampler import fault_of


@dataclass(frozen=True)
class Album:
    """The folder that a call writes to."""

    folder: Path
    recipes: Recipes

    def key(self, shot: Shot) -> str:
        """The same for two pictures of one recipe."""
        return recipe_key(self.recipes.of(shot))

    def found(self) -> dict[str, Path]:
        """The pictures that are in the folder, by `key`; what a killed writer left long ago is removed."""
        remove_stale(self.folder)
        found: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.png")):
            recipe = read_recipe(path)
            if recipe is not None and "sheet" not in recipe:
                found.setdefault(recipe_key(recipe), path)
        return found

    def add(self, shot: Shot, image: Image.Image) -> Path:
        """Write the picture, warn if it shows nothing, and return its file."""
        path = _save(image, self.folder / f"{shot.stem}.png", self.recipes.of(shot))
        if fault := fault_of(image):
            say(f"warning: {path}: {fault}")
        return path

    def add_sheet(self, first: Shot, sheet: Image.Image, kind: str) -> Path:
        """Write one picture of several, of which `first` is the one whose recipe it carries."""
        return _save(sheet, self.folder / f"{first.stem}-{kind}.png", {**self.recipes.of(first), "sheet": kind})

    def add_grid(self, grid: Grid, shots: Sequence[Sequence[Shot]], files: Sequence[Sequence[Path]]) -> Path:
        """Write the picture of a whole grid, or find it: the same one is not written twice."""
        keys = [[self.key(shot) for shot in row] for row in shots]
        shown = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
        first = shots[0][0]
        recipe = {**self.recipes.of(first), "sheet": "grid", "shows": shown}
        for path in sorted(self.folder.glob("*-grid*.png")):
            if read_recipe(path) == recipe:
                return path
        images = [[_opened(path) for path in row] for row in files]
        return _save(grid.sheet(images), self.folder / f"{replace(first, name=None).stem}-grid.png", recipe)


def before_and_after(before: Sequence[Image.Image], after: Sequence[Image.Image], shots: Sequence[Shot]) -> Image.Image:
    """Two rows in one picture, a column a shot."""
    columns = [f"seed {shot.seed}" for shot in shots]
    side = min(512, max(128, *(shots[0].size or (0, 0))))
    return contact_sheet([before, after], columns, ["before: the base alone", "after: with the adapter"], side)


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def _save(image: Image.Image, wanted: Path, recipe: Mapping[str, Any]) -> Path:
    info = PngInfo()
    info.add_itxt(RECIPE_KEY, json.dumps(recipe, ensure_ascii=False))
    path = _unused(wanted)
    with new_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
    return path


def _unused(path: Path) -> Path:
    """`path`, or the first of `-2`, `-3`, ... that does not exist: earlier images are never overwritten."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate

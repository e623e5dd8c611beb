"""The output folder: each image holds its recipe, and none is overwritten or drawn twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sd3tune.files.atomic import remove_stale
from sd3tune.files.png_recipe import save_png
from sd3tune.inference.grid import Grid
from sd3tune.inference.image_request import ImageRequest
from sd3tune.inference.recipes import Recipes, as_text, read_recipe, recipe_key
from sd3tune.inference.session import InferenceSession, draw
from sd3tune.reporting import say
from sd3tune.sampling.contact_sheet import contact_sheet
from sd3tune.sampling.sampler import fault_of


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images, and the recipes of the images that a job adds."""

    path: Path
    recipes: Recipes

    def key(self, request: ImageRequest) -> str:
        """Return the identity of an image: equal for two requests with the same recipe."""
        return recipe_key(self.recipes.recipe(request))

    def existing(self) -> dict[str, Path]:
        """Return the images in the folder by `key`. Also removes old temporary files of killed processes."""
        remove_stale(self.path)
        images: dict[str, Path] = {}
        for path in sorted(self.path.glob("*.png")):
            recipe = read_recipe(path)
            if recipe is not None and "sheet" not in recipe:
                images.setdefault(recipe_key(recipe), path)
        return images

    def add(self, request: ImageRequest, image: Image.Image) -> Path:
        """Write the image, warn if it shows nothing, and return its file."""
        path = _save(image, self.path / f"{request.stem}.png", self.recipes.recipe(request))
        if fault := fault_of(image):
            say(f"warning: {path}: {fault}")
        return path

    def add_sheet(self, first: ImageRequest, sheet: Image.Image, kind: str) -> Path:
        """Write a contact sheet, with the recipe of its `first` image."""
        return _save(sheet, self.path / f"{first.stem}-{kind}.png", {**self.recipes.recipe(first), "sheet": kind})

    def add_grid(self, grid: Grid, requests: Sequence[Sequence[ImageRequest]], files: Sequence[Sequence[Path]]) -> Path:
        """Write the contact sheet of a grid, unless the folder already has it, and return its file."""
        keys = [[self.key(request) for request in row] for row in requests]
        cells_digest = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
        first = requests[0][0]
        recipe = {**self.recipes.recipe(first), "sheet": "grid", "shows": cells_digest}
        for path in sorted(self.path.glob("*-grid*.png")):
            if read_recipe(path) == recipe:
                return path
        images = [[_opened(path) for path in row] for row in files]
        return _save(grid.sheet(images), self.path / f"{replace(first, name=None).stem}-grid.png", recipe)


def draw_missing(session: InferenceSession, folder: ImageFolder, requests: Sequence[ImageRequest]) -> list[Path]:
    """Draw the requests whose recipe no image in the folder has. Return the files in the order of the requests.

    Each image is written as soon as it is drawn, so an interruption loses only the current batch.
    """
    started, files = time.monotonic(), folder.existing()
    missing = {folder.key(request): request for request in requests if folder.key(request) not in files}
    distinct = len({folder.key(request) for request in requests})
    if missing:
        for request, image in draw(session, list(missing.values())):
            files[folder.key(request)] = folder.add(request, image)
    seconds = time.monotonic() - started
    each = f", {seconds / len(missing):.1f} s each" if missing else ""
    say(f"{len(missing)} drawn in {seconds:.0f} s{each}; {distinct - len(missing)} were there; all in {folder.path}")
    if distinct < len(requests):
        say(f"note: {len(requests) - distinct} of the {len(requests)} repeat another request")
    return [files[folder.key(request)] for request in requests]


def before_and_after(
    before: Sequence[Image.Image], after: Sequence[Image.Image], requests: Sequence[ImageRequest]
) -> Image.Image:
    """Return a contact sheet of two rows, `before` and `after`, with a column per request."""
    columns = [f"seed {request.seed}" for request in requests]
    side = min(512, max(128, *(requests[0].size or (0, 0))))
    return contact_sheet([before, after], columns, ["before: the base alone", "after: with the adapter"], side)


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def _save(image: Image.Image, target: Path, recipe: Mapping[str, Any]) -> Path:
    path = _unused(target)
    save_png(image, path, as_text(recipe))
    return path


def _unused(path: Path) -> Path:
    """Return `path`, or the first of `-2`, `-3`, ... that does not exist: earlier images are never overwritten."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate

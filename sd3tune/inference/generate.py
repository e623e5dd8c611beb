"""`sd3tune.generate`: images for notebooks and other programs, as `sd3tune infer` draws them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sd3tune.files.png_recipe import RECIPE_KEY
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.learned import check_tokens
from sd3tune.inference.prepare import download_policy, prepare
from sd3tune.inference.recipes import Recipes
from sd3tune.inference.session import draw
from sd3tune.reporting import say
from sd3tune.sampling.sampler import fault_of

Source = str | os.PathLike[str]
"""A file, a folder, a run, or a repository on the Hub."""
Lora = Source | tuple[Source, float]
"""An adapter, or an adapter and its weight."""
_FILE_FIELDS = {"out", "before"}
"""Fields of `InferenceJob` that concern only the files that `sd3tune infer` writes."""


def generate(
    prompt: str | None = None,
    *,
    lora: Lora | Sequence[Lora] = (),
    base: Source | None = None,
    seed: int | None = None,
    num: int = 1,
    **fields: Any,
) -> list[Image.Image]:
    """Draw images with one or several adapters, with the inference settings that they carry.

    `lora` is a run, a path, a checkpoint or a Hub repository, `PATH@0.8` or (path, 0.8) with a weight, or a list of
    these; without one, `base` draws alone. `base` is the name, folder or file of a base, or a run that trained one.
    `num` images have the seeds `seed` (0), `seed + 1` and so on. `fields` are any other options of `sd3tune infer` by
    their names in Python, such as `steps`, `guidance`, `size=(1152, 896)`, `negative`, `sampler`, `image`, `mask`,
    `prompts="file.csv"`, `grid=["weight=0,1"]` or `from_picture`; see `job.ALL_PARAMETERS`.

    Returns RGB images in the order of their seeds, lines or rows, equal to the files that `sd3tune infer` writes. The
    recipe of each, as JSON, is `image.info["sd3tune"]`. No file is written. Raises UserError for every mistake in the
    values, and TypeError for a name that is no option.
    """
    if extra := _FILE_FIELDS & fields.keys():
        raise TypeError(f"{min(extra)!r} is about files, and generate writes none; save the images that it returns")
    given = {**fields, "prompt": prompt, "seed": seed, "num": num}
    job = InferenceJob.from_fields(loras=_as_texts(lora), base=None if base is None else _base(base), **given)
    with download_policy(job):
        prepared = prepare(job)
        check_tokens(prepared.requests, prepared.session)
        recipes = Recipes(prepared.session)
        images: dict[Any, Image.Image] = {}
        for request, image in draw(prepared.session, list(dict.fromkeys(prepared.requests)), one_by_one=False):
            if fault := fault_of(image):
                say(f"warning: {request.stem}: {fault}")
            image.info[RECIPE_KEY] = recipes.text(request)
            images[request] = image
        return [images[request] for request in prepared.requests]


def _as_texts(lora: Any) -> list[str]:
    """Return adapters as values of `--lora`."""
    if isinstance(lora, str | os.PathLike):
        return [os.fspath(lora)]
    if isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], int | float):
        path, weight = lora
        return [f"{os.fspath(path)}@{weight}"]
    return [text for one in lora for text in _as_texts(one)]


def _base(base: Source) -> str:
    """Return a base as a value of `--base`: for a run that trained a whole model, its `model` folder."""
    trained = Path(base) / "model"
    return str(trained) if (trained / "model_index.json").is_file() else os.fspath(base)

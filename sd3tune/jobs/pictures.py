"""Pictures on the disk: each with its recipe inside, none ever overwritten."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3tune import __version__
from sd3tune.atomic import new_file
from sd3tune.jobs.conditions import Conditions, Request
from sd3tune.jobs.machine import dtype_name
from sd3tune.model.adapter_io import ADAPTER_FILE, Adapter
from sd3tune.sampling.contact_sheet import contact_sheet

RECIPE_KEY = "sd3tune"
"""The text chunk of a PNG that holds its recipe, as JSON."""


def recipe(
    request: Request, conditions: Conditions, adapters: Sequence[tuple[Adapter, float]], dtype: torch.dtype
) -> dict[str, Any]:
    """What is needed to draw the image again; adapters by name and hash, never by path."""
    return {
        "sd3tune": __version__,
        "prompt": request.prompt,
        "negative": request.negative,
        "steps": request.steps,
        "guidance": request.guidance,
        "size": [conditions.sampler.width, conditions.sampler.height],
        "base": conditions.base.label,
        "base_revision": conditions.base.revision,
        "max_sequence_length": conditions.t5_length,
        "encoders": list(conditions.encoders),
        "dtype": dtype_name(dtype),
        "loras": [
            {"name": adapter.origin or _name_of(adapter.path), "sha256": _sha256(adapter.path), "weight": weight}
            for adapter, weight in adapters
        ],
    }


def write_images(
    request: Request, recipe: Mapping[str, Any], images: Mapping[str, Sequence[Image.Image]]
) -> list[Path]:
    """Write the `after` images and, with `before` ones, one picture of both. Returns the files, that picture last."""
    stem = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:60] or "image"
    written = []
    for number, image in enumerate(images["after"]):
        seed = request.seed + number
        written.append(_save(image, request.out / f"{stem}-seed{seed}.png", {**recipe, "seed": seed}))
    if "before" in images:
        rows = [images["before"], images["after"]]
        columns = [f"seed {request.seed + number}" for number in range(request.num)]
        side = min(512, max(128, *recipe["size"]))
        sheet = contact_sheet(rows, columns, ["before: the base alone", "after: with the adapter"], side)
        path = request.out / f"{stem}-seed{request.seed}-before-after.png"
        written.append(_save(sheet, path, {**recipe, "seed": request.seed}))
    return written


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


def _name_of(adapter: Path) -> str:
    """A name for people: the file's own, or else that of its run; never the path."""
    if adapter.name != ADAPTER_FILE:
        return adapter.stem
    folders = [part for part in adapter.resolve().parts[:-1] if part not in ("adapter", "adapter_raw", "checkpoints")]
    return folders[-1]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

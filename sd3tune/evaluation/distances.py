"""FID and KID between two folders of pictures, by each encoder of likeness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sd3tune.data.images import ImageRef
from sd3tune.errors import DataError, MeasureUnavailable
from sd3tune.evaluation.measuring import SUBJECT, encoded
from sd3tune.evaluation.photos import images_of
from sd3tune.measures.distribution import fid, kid, too_few
from sd3tune.measures.encoders import encoders_for, loaded
from sd3tune.reporting import say

LEAST = 4
"""Pictures of a folder: KID needs two subsets of two."""


def distances(
    first: Path, second: Path, encoders: Mapping[str, str], device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield, for each encoder that can be loaded, a line and its figures. Raises UserError."""
    sides = [_pictures(folder) for folder in (first, second)]
    fewest = min(map(len, sides))
    sizes = " and ".join(str(len(side)) for side in sides)
    if len(sides[0]) != len(sides[1]):
        say(f"note: {sizes} pictures: FID of unequal sides is not comparable; give both folders the same number")
    warned = False
    for spec in encoders_for("default", "", encoders):
        if SUBJECT not in spec.measures:
            continue
        try:
            with loaded(spec, device) as encoder:
                a, b = (encoded(encoder, side, f"measuring {spec.name}") for side in sides)
            figures = {"fid": fid(a, b), "kid": (of := kid(a, b)).mean, "kid_std": of.std}
        except MeasureUnavailable as error:
            say(*(f"warning: not measured: {problem}" for problem in error.problems))
            continue
        if not warned and (warning := too_few(fewest, a.shape[1])):
            say(f"warning: {warning}")
            warned = True
        line = f"{spec.name}  FID {figures['fid']:.4g}, KID {figures['kid']:.4g} ±{of.std:.2g}, {sizes} pictures"
        yield line, {"encoder": spec.name, "source": spec.label, "pictures": [len(a), len(b)], **figures}


def _pictures(folder: Path) -> Sequence[ImageRef]:
    images = images_of(folder, "--fid")
    if len(images) < LEAST:
        raise DataError(f"--fid: {folder}: holds {len(images)} pictures; at least {LEAST} are needed")
    return images

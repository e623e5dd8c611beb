"""Measurement of pictures by one encoder at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageOps
from torch import Tensor

from sd3tune.data.images import ImageRef, open_image
from sd3tune.errors import MeasureUnavailable
from sd3tune.evaluation.photos import Photos
from sd3tune.evaluation.pictures import BASE_ROW, OF_CLASS, SCORED, Picture
from sd3tune.measures.encoders import EncoderSpec, ImageEncoder, TextImageEncoder, fetch, loaded
from sd3tune.measures.similarity import (
    copied,
    diversity,
    fidelity,
    moved,
    nearest,
    nearest_by_pixels,
    photos_among_themselves,
    prompt_fidelity,
)
from sd3tune.reporting import progress_bar, say

SUBJECT, HELD_OUT, PROMPT, DIVERSITY = "subject", "held_out", "prompt", "diversity"
NEAREST, CLASS_SUBJECT, MOVED = "nearest", "class_subject", "moved"
PIXELS = "pixels"
"""The name under which differences in pixels stand beside encoders."""
PHOTOS_ROW = "photos"
_PIXEL_SIDE = 64
Key = tuple[str, str]
"""(measure, encoder)."""


@dataclass
class Measured:
    """The figures of each picture, by the encoders so far."""

    pictures: Sequence[Picture]
    values: list[dict[Key, float]]
    """For each picture, its figures."""
    photo_values: list[dict[Key, float]]
    """For each training photo, its figures against the other photos."""
    nearest_photo: dict[tuple[int, str], int] = field(default_factory=dict)
    """(index of a picture, encoder) -> index of its nearest training photo."""
    copies: dict[tuple[int, str], bool] = field(default_factory=dict)
    """(index of a picture, encoder) -> True if it copies a training photo."""
    by_prompt: dict[tuple[str, Key], list[float]] = field(default_factory=dict)
    """(row, key) -> a figure for each prompt, for measures of several pictures."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """Encoder -> the reason why it could not be loaded."""


def fetch_encoders(specs: Sequence[EncoderSpec]) -> dict[str, str]:
    """Download the encoders that are not here yet. Return the reason for each that cannot be had, and print it."""
    unavailable: dict[str, str] = {}
    for spec in specs:
        with _noting(unavailable, spec):
            fetch(spec)
    return unavailable


def measure(
    pictures: Sequence[Picture],
    photos: Photos,
    specs: Sequence[EncoderSpec],
    device: torch.device,
    unavailable: Mapping[str, str] | None = None,
) -> Measured:
    """Measure every picture with every encoder that can be loaded, one at a time, each image by itself.

    A figure therefore depends neither on the order of the pictures nor on a batch size. `unavailable` is the result of
    `fetch_encoders`.
    """
    measured = Measured(pictures, [{} for _ in pictures], [{} for _ in photos.training])
    measured.unavailable |= unavailable or {}
    for spec in specs:
        if spec.name not in measured.unavailable:
            with _noting(measured.unavailable, spec), loaded(spec, device) as encoder:
                _by_encoder(measured, photos, spec, encoder)
    _by_pixels(measured, photos)
    return measured


@contextmanager
def _noting(unavailable: dict[str, str], spec: EncoderSpec) -> Iterator[None]:
    """Print and note the reason if the body finds that an encoder cannot be had."""
    try:
        yield
    except MeasureUnavailable as error:
        unavailable[spec.name] = " ".join(error.problems)
        say(*(f"warning: not measured: {problem}" for problem in error.problems))


def _by_encoder(measured: Measured, photos: Photos, spec: EncoderSpec, encoder: ImageEncoder) -> None:
    name, pictures = spec.name, measured.pictures
    features = encoded(encoder, [picture.file for picture in pictures], f"measuring pictures with {name}")
    if PROMPT in spec.measures:
        _by_prompts(measured, name, features, encoder)
    if SUBJECT not in spec.measures:
        return
    training = encoded(encoder, photos.training, f"measuring photos with {name}")
    held_out = encoded(encoder, photos.held_out, f"measuring held-out photos with {name}")
    closest, which = nearest(features, training)
    several = len(training) > 1
    copies = copied(features, training).tolist() if several else [False] * len(pictures)
    likeness = fidelity(features, training).tolist()
    to_held_out = fidelity(features, held_out).tolist() if len(held_out) else []
    for index, picture in enumerate(pictures):
        values = measured.values[index]
        if picture.kind == OF_CLASS:
            values[CLASS_SUBJECT, name] = likeness[index]
            continue
        values[SUBJECT, name] = likeness[index]
        values[NEAREST, name] = float(closest[index])
        measured.nearest_photo[index, name] = int(which[index])
        measured.copies[index, name] = copies[index]
        if to_held_out:
            values[HELD_OUT, name] = to_held_out[index]
    if several:
        _photos_themselves(measured, name, training)
    _diversities(measured, name, features)
    _moves(measured, name, features)


def _by_prompts(measured: Measured, name: str, features: Tensor, encoder: ImageEncoder) -> None:
    texts = {p.scored_as for p in measured.pictures if p.kind == SCORED and p.scored_as is not None}
    if not texts or not isinstance(encoder, TextImageEncoder):
        return
    ordered = sorted(texts)
    encoded = dict(zip(ordered, encoder.texts(ordered), strict=True))
    for index, picture in enumerate(measured.pictures):
        if picture.kind == SCORED and picture.scored_as is not None:
            own = prompt_fidelity(features[index : index + 1], encoded[picture.scored_as][None])
            measured.values[index][PROMPT, name] = float(own)


def _photos_themselves(measured: Measured, name: str, training: Tensor) -> None:
    for index, likeness in enumerate(photos_among_themselves(training).tolist()):
        others = torch.cat([training[:index], training[index + 1 :]])
        closest, _ = nearest(training[index : index + 1], others)
        measured.photo_values[index] |= {(SUBJECT, name): likeness, (NEAREST, name): float(closest)}
    measured.by_prompt[PHOTOS_ROW, (DIVERSITY, name)] = [diversity(training)]


def _diversities(measured: Measured, name: str, features: Tensor) -> None:
    groups: dict[tuple[str, int], list[int]] = {}
    for index, picture in enumerate(measured.pictures):
        if picture.kind == SCORED:
            groups.setdefault((picture.row, picture.number), []).append(index)
    for (row, _), indices in groups.items():
        if len(indices) > 1:
            measured.by_prompt.setdefault((row, (DIVERSITY, name)), []).append(diversity(features[indices]))


def _moves(measured: Measured, name: str, features: Tensor) -> None:
    """Compare each picture of a class prompt with the base's at the same seed."""
    of_base = {
        (picture.number, picture.seed): index
        for index, picture in enumerate(measured.pictures)
        if picture.kind == OF_CLASS and picture.row == BASE_ROW
    }
    for index, picture in enumerate(measured.pictures):
        base = of_base.get((picture.number, picture.seed))
        if picture.kind == OF_CLASS and picture.row != BASE_ROW and base is not None:
            distance = moved(features[index : index + 1], features[base : base + 1])
            measured.values[index][MOVED, name] = float(distance)


def _by_pixels(measured: Measured, photos: Photos) -> None:
    small = [_shrunk(open_image(photo)) for photo in photos.training]
    for index, picture in enumerate(measured.pictures):
        if picture.kind == SCORED:
            difference, which = nearest_by_pixels([_shrunk(open_image(picture.file))], small)
            measured.values[index][NEAREST, PIXELS] = float(difference)
            measured.nearest_photo[index, PIXELS] = int(which)
    for index in range(len(small) if len(small) > 1 else 0):
        difference, _ = nearest_by_pixels([small[index]], small[:index] + small[index + 1 :])
        measured.photo_values[index][NEAREST, PIXELS] = float(difference)


def _shrunk(image: Image.Image) -> Image.Image:
    return ImageOps.fit(image, (_PIXEL_SIDE, _PIXEL_SIDE), Image.Resampling.LANCZOS)


def encoded(encoder: ImageEncoder, images: Sequence[ImageRef], activity: str) -> Tensor:
    """Return the features [n, d] of images, each encoded by itself."""
    if not images:
        return torch.empty(0, 0)
    bar = progress_bar(images, desc=activity, unit="image", delay=2, leave=False)
    return torch.cat([encoder.images([open_image(image)]) for image in bar])

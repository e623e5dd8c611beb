"""What a run will take, from its configuration: memory phase by phase, room in the store, steps and operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sd3tune.config import Config
from sd3tune.config.meaning import settings_of
from sd3tune.config.sections.key import Phase
from sd3tune.data.buckets import Size
from sd3tune.data.crops import Crop, crops
from sd3tune.data.images import file_digest, upright_size
from sd3tune.data.records import Record, load_records
from sd3tune.encode.captions import CLIP_LENGTH, entry_bytes
from sd3tune.encode.images import bytes_per_pixel
from sd3tune.errors import DataError
from sd3tune.forecast.rehearsal import (
    Training,
    Use,
    rehearse_drawing,
    rehearse_text_encoder,
    rehearse_training,
    rehearse_vae,
)
from sd3tune.methods import METHODS, Method
from sd3tune.model.base.base import Base
from sd3tune.model.base.resolve import shape_of_base
from sd3tune.model.load.components import empty_transformer
from sd3tune.run.buckets import bucket_of, buckets_of
from sd3tune.run.encoding import texts_to_encode
from sd3tune.run.preflight import check_installed, check_size, split_records, with_steps
from sd3tune.run.priors import PlannedPrior, plan_priors

CONTEXT = 600_000_000
"""Bytes that CUDA and its libraries take of a card before anything else: an allowance, not a measurement."""
PHASES: tuple[Phase, Phase, Phase] = ("encode", "train", "draw")
MARGIN = 0.05
"""Share of the peak that fragments of the allocator and work spaces of cuDNN may take: an allowance, too."""


@dataclass(frozen=True)
class Outlook:
    """A configuration and what is known without weights."""

    config: Config
    base: Base
    dtype: torch.dtype
    buckets: Sequence[Size]
    largest: Size
    """The bucket with the most pixels, (height, width): of those that the images are cut to, where there are images."""
    records: Sequence[Record] | None
    """None where the images are not there."""
    holdout: Sequence[Record]
    priors: Sequence[PlannedPrior]
    missing: Sequence[str]
    """Why there are no images."""


@dataclass(frozen=True)
class Store:
    """What the store takes when all is encoded."""

    texts: int
    images: int
    """Variants counted."""
    nbytes: int


@dataclass(frozen=True)
class Forecast:
    """What a run will take."""

    outlook: Outlook
    encoding: dict[str, Use]
    """By component: `clip_l`, `clip_g`, `t5`, `vae`."""
    drawing: Use | None
    """Drawing class images, where some are missing."""
    training: Training
    store: Store | None

    @property
    def phases(self) -> dict[str, Use]:
        """In the order in which they come; what is computed on the CPU takes nothing of a card."""
        training = self.training
        on_the_cpu = {"t5"} if self.outlook.config.model.t5_device == "cpu" else set()
        found = {f"encode {LABELS[name]}": use for name, use in self.encoding.items() if name not in on_the_cpu}
        if self.drawing is not None:
            found["draw class images"] = self.drawing
        found["train"] = Use(training.resident, training.working)
        if training.preview is not None:
            found["preview"] = Use(training.resident, training.preview)
        return found

    @property
    def peak(self) -> int:
        return max(use.peak for use in self.phases.values())

    @property
    def needed(self) -> int:
        """The peak with its allowances."""
        return round(self.peak * (1 + MARGIN)) + CONTEXT


LABELS = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5", "vae": "images"}


def look_ahead(config: Config, dtype: torch.dtype) -> Outlook:
    """What the configuration comes to. Raises UserError as preflight does, but not for images that are not there."""
    check_installed(config)
    base = shape_of_base(config.model, config.seed)
    transformer = empty_transformer(base)
    check_size(config, transformer.config)
    METHODS[config.method.kind](config, base).select(transformer)
    buckets = buckets_of(config, transformer.config)
    records: list[Record] | None = None
    holdout: list[Record] = []
    priors: list[PlannedPrior] = []
    missing: Sequence[str] = ()
    used = buckets
    try:
        records, holdout = split_records(config, load_records(config.data))
        config = with_steps(config, sum(record.repeats for record in records), 1)
        priors = plan_priors(config, records, buckets, base)
        used = [bucket_of(record, buckets) for record in records]
    except DataError as error:
        records, missing = None, error.problems
    largest = max(used, key=lambda size: size[0] * size[1])
    return Outlook(config, base, dtype, buckets, largest, records, holdout, priors, missing)


def forecast(outlook: Outlook, like: Forecast | None = None) -> Forecast:
    """Everything, by rehearsing each phase; what is known from `like` is not rehearsed again."""
    config, base, dtype, largest = outlook.config, outlook.base, outlook.dtype, outlook.largest
    method = METHODS[config.method.kind](config, base)
    encoded, trained, drawn = (
        like if like and _settings(outlook, phase) == _settings(like.outlook, phase) else None for phase in PHASES
    )
    drawing = drawn.drawing if drawn else None
    if drawing is None and any(prior.missing for prior in outlook.priors):
        drawing = rehearse_drawing(config, base, method, largest, dtype)
    training = trained.training if trained else None
    if training is None:
        previewed = drawn.training if drawn else None
        training = rehearse_training(config, base, method, largest, dtype, previewed)
    return Forecast(
        outlook=outlook,
        encoding=encoded.encoding if encoded else _encoding(outlook, method),
        drawing=drawing,
        training=training,
        store=None if outlook.records is None else _store(outlook, outlook.records, method.cached_encoders),
    )


def _settings(outlook: Outlook, phase: Phase) -> tuple[dict[str, Any], torch.dtype, Size]:
    return settings_of(outlook.config, phase), outlook.dtype, outlook.largest


def _encoding(outlook: Outlook, method: Method) -> dict[str, Use]:
    base, model = outlook.base, outlook.config.model
    forms = {name: model.t5_quantize if name == "t5" else "none" for name in method.cached_encoders}
    encoding = {
        name: rehearse_text_encoder(base, name, outlook.dtype, max(model.t5_lengths), form)
        for name, form in forms.items()
    }
    return {**encoding, "vae": rehearse_vae(base, outlook.largest, outlook.dtype)}


def _store(outlook: Outlook, records: Sequence[Record], encoders: Sequence[str]) -> Store:
    """Counted as `encode_captions` and `encode_images` count what they are about to write; headers are not.

    Copies of an image count twice here, as its bytes are not compared.
    """
    config = outlook.config
    of_class = [record for prior in outlook.priors for record in prior.records]
    texts = dict.fromkeys(texts_to_encode(config, [*records, *outlook.holdout, *of_class], bool(outlook.priors)))
    a_text = sum(
        entry_bytes(outlook.base, encoder, outlook.dtype, tokens)
        for encoder in encoders
        for tokens in (config.model.t5_lengths if encoder == "t5" else [CLIP_LENGTH])
    )
    sizes = [cut.size for record in records for cut in _cuts(outlook, record)]
    sizes += [bucket_of(record, outlook.buckets) for record in outlook.holdout] + [outlook.largest] * len(of_class)
    pixels = sum(height * width for height, width in sizes)
    nbytes = a_text * len(texts) + round(pixels * bytes_per_pixel(outlook.base))
    return Store(len(texts), len(sizes), nbytes)


def _cuts(outlook: Outlook, record: Record) -> set[Crop]:
    """The different variants of an image: where its shape is the bucket's, random crops are all the same one."""
    data, target = outlook.config.data, bucket_of(record, outlook.buckets)
    digest = file_digest(record.image) if data.crop_variants > 1 else ""  # it says where random crops lie
    return set(crops(upright_size(record.image), target, data.crop_variants, data.flip, digest))

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
    MemoryUse,
    Training,
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
from sd3tune.run.preflight import check_installed, check_size, resolve_epochs, split_records
from sd3tune.run.priors import PlannedPrior, plan_priors

CONTEXT = 600_000_000
"""Bytes that CUDA and its libraries take of a card before anything else: an allowance, not a measurement."""
PHASES: tuple[Phase, Phase, Phase] = ("encode", "train", "draw")
MARGIN = 0.05
"""Share of the peak that fragments of the allocator and work spaces of cuDNN may take: an allowance, too."""


@dataclass(frozen=True)
class ForecastInputs:
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

    inputs: ForecastInputs
    encoding: dict[str, MemoryUse]
    """By component: `clip_l`, `clip_g`, `t5`, `vae`."""
    drawing: MemoryUse | None
    """Drawing class images, where some are missing."""
    training: Training
    store: Store | None

    @property
    def phases(self) -> dict[str, MemoryUse]:
        """In the order in which they come; what is computed on the CPU takes nothing of a card."""
        training = self.training
        on_the_cpu = {"t5"} if self.inputs.config.model.t5_device == "cpu" else set()
        found = {f"encode {LABELS[name]}": use for name, use in self.encoding.items() if name not in on_the_cpu}
        if self.drawing is not None:
            found["draw class images"] = self.drawing
        found["train"] = MemoryUse(training.resident, training.working)
        if training.preview is not None:
            found["preview"] = MemoryUse(training.resident, training.preview)
        return found

    @property
    def peak(self) -> int:
        return max(use.peak for use in self.phases.values())

    @property
    def needed(self) -> int:
        """The peak with its allowances."""
        return round(self.peak * (1 + MARGIN)) + CONTEXT


LABELS = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5", "vae": "images"}


def forecast_inputs(config: Config, dtype: torch.dtype) -> ForecastInputs:
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
        config = resolve_epochs(config, sum(record.repeats for record in records), 1)
        priors = plan_priors(config, records, buckets, base)
        used = [bucket_of(record, buckets) for record in records]
    except DataError as error:
        records, missing = None, error.problems
    largest = max(used, key=lambda size: size[0] * size[1])
    return ForecastInputs(config, base, dtype, buckets, largest, records, holdout, priors, missing)


def forecast(inputs: ForecastInputs, like: Forecast | None = None) -> Forecast:
    """Everything, by rehearsing each phase; what is known from `like` is not rehearsed again."""
    config, base, dtype, largest = inputs.config, inputs.base, inputs.dtype, inputs.largest
    method = METHODS[config.method.kind](config, base)
    encoded, trained, drawn = (
        like if like and _settings(inputs, phase) == _settings(like.inputs, phase) else None for phase in PHASES
    )
    drawing = drawn.drawing if drawn else None
    if drawing is None and any(prior.missing for prior in inputs.priors):
        drawing = rehearse_drawing(config, base, method, largest, dtype)
    training = trained.training if trained else None
    if training is None:
        previewed = drawn.training if drawn else None
        training = rehearse_training(config, base, method, largest, dtype, previewed)
    return Forecast(
        inputs=inputs,
        encoding=encoded.encoding if encoded else _encoding(inputs, method),
        drawing=drawing,
        training=training,
        store=None if inputs.records is None else _store(inputs, inputs.records, method.cached_encoders),
    )


def _settings(inputs: ForecastInputs, phase: Phase) -> tuple[dict[str, Any], torch.dtype, Size]:
    return settings_of(inputs.config, phase), inputs.dtype, inputs.largest


def _encoding(inputs: ForecastInputs, method: Method) -> dict[str, MemoryUse]:
    base, model = inputs.base, inputs.config.model
    forms = {name: model.t5_quantize if name == "t5" else "none" for name in method.cached_encoders}
    encoding = {
        name: rehearse_text_encoder(base, name, inputs.dtype, max(model.t5_lengths), form)
        for name, form in forms.items()
    }
    return {**encoding, "vae": rehearse_vae(base, inputs.largest, inputs.dtype)}


def _store(inputs: ForecastInputs, records: Sequence[Record], encoders: Sequence[str]) -> Store:
    """Counted as `encode_captions` and `encode_images` count what they are about to write; headers are not.

    Copies of an image count twice here, as its bytes are not compared.
    """
    config = inputs.config
    of_class = [record for prior in inputs.priors for record in prior.records]
    texts = dict.fromkeys(texts_to_encode(config, [*records, *inputs.holdout, *of_class], bool(inputs.priors)))
    a_text = sum(
        entry_bytes(inputs.base, encoder, inputs.dtype, tokens)
        for encoder in encoders
        for tokens in (config.model.t5_lengths if encoder == "t5" else [CLIP_LENGTH])
    )
    sizes = [cut.size for record in records for cut in _cuts(inputs, record)]
    sizes += [bucket_of(record, inputs.buckets) for record in inputs.holdout] + [inputs.largest] * len(of_class)
    pixels = sum(height * width for height, width in sizes)
    nbytes = a_text * len(texts) + round(pixels * bytes_per_pixel(inputs.base))
    return Store(len(texts), len(sizes), nbytes)


def _cuts(inputs: ForecastInputs, record: Record) -> set[Crop]:
    """The different variants of an image: where its shape is the bucket's, random crops are all the same one."""
    data, target = inputs.config.data, bucket_of(record, inputs.buckets)
    digest = file_digest(record.image) if data.crop_variants > 1 else ""  # it says where random crops lie
    return set(crops(upright_size(record.image), target, data.crop_variants, data.flip, digest))

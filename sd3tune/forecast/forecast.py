"""The forecast of a run from its configuration: memory by phase, disk space of the store, steps and operations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sd3tune.config import Config
from sd3tune.config.meaning import settings_of
from sd3tune.config.sections.key import Phase
from sd3tune.data.buckets import Size
from sd3tune.data.crops import Crop, crops, mask_bytes
from sd3tune.data.images import file_digest
from sd3tune.data.records import Record
from sd3tune.encode.captions import text_bytes, texts_read_by
from sd3tune.encode.images import bytes_per_pixel
from sd3tune.errors import DataError
from sd3tune.forecast.optimizer_memory import MemoryUse
from sd3tune.forecast.rehearsal import (
    Training,
    loaded_shape,
    rehearse_drawing,
    rehearse_text_encoder,
    rehearse_training,
    rehearse_vae,
)
from sd3tune.forecast.sharding import divided
from sd3tune.measures.prompts import Prompts
from sd3tune.methods import METHODS, Method
from sd3tune.model.base.base import Base
from sd3tune.model.base.resolve import shape_of_base
from sd3tune.model.load.components import empty_transformer
from sd3tune.run.base_sampling import with_base_sampling
from sd3tune.run.buckets import bucket_of, bucket_tables, buckets_in, largest_bucket
from sd3tune.run.encoding import captions_to_encode, prompts_to_encode
from sd3tune.run.evaluated import evaluated_prompts
from sd3tune.run.preflight import (
    check_installed,
    check_precision,
    check_size,
    resolve_epochs,
    split_records,
)
from sd3tune.run.priors import PlannedPrior, plan_priors, with_captions
from sd3tune.run.sizes import held_out_size, in_all_sizes, used_images
from sd3tune.run.stream_checks import check_stream, load_of

CONTEXT = 600_000_000
"""Bytes of GPU memory that CUDA and its libraries take by themselves: an allowance, not a measurement."""
ENCODER = 640_000_000
"""Bytes of measuring a picture: an allowance for CLIP ViT-B/32, the largest default encoder, 151 M weights in fp32."""
PHASES: tuple[Phase, Phase, Phase] = ("encode", "train", "draw")
MARGIN = 0.05
"""Share of the peak for allocator fragmentation (1 to 4 % with `grow_segments`) and cuDNN workspaces: an allowance."""


@dataclass(frozen=True)
class ForecastInputs:
    """A configuration and the facts about it that need no weights."""

    config: Config
    base: Base
    dtype: torch.dtype
    buckets: Sequence[Size]
    sized: Sequence[Record]
    """A record for each image and size; empty if the images are missing."""
    largest: Size
    """The bucket with the most pixels, (height, width): of the buckets in use or, without images, of all."""
    records: Sequence[Record] | None
    """None if the images are missing."""
    holdout: Sequence[Record]
    priors: Sequence[PlannedPrior]
    evaluated: Prompts | None
    """The prompts of `eval`; None if it is off, or if the images are missing."""
    missing: Sequence[str]
    """The problems found if the images are missing."""
    world: int = 1
    """Number of processes that train together."""
    loaded: Sequence[Record] | None = None
    """The records of all images of the sources, for another forecast of the same data."""

    @property
    def mix(self) -> dict[Size, int]:
        """The largest bucket of each size of the run -> samples per epoch of that size."""
        tables: dict[tuple[Size, ...], list[Record]] = {}
        for record in self.sized:
            tables.setdefault(record.sizes, []).append(record)
        if len(tables) <= 1:
            return {self.largest: 1}
        return {
            largest_bucket(bucket_of(one, self.buckets) for one in records): sum(one.repeats for one in records)
            for records in tables.values()
        }


@dataclass(frozen=True)
class Store:
    """Size of the store after encoding."""

    texts: int
    images: int
    """Entries: each variant of an image counts."""
    masks: int
    nbytes: int


@dataclass(frozen=True)
class Forecast:
    """Memory of each phase of a run, cost of a step, and size of the store."""

    inputs: ForecastInputs
    encoding: dict[str, MemoryUse]
    """By component: `clip_l`, `clip_g`, `t5`, `vae`."""
    drawing: MemoryUse | None
    """Memory for drawing class images; None if none is missing."""
    training: Training

    @property
    def phases(self) -> dict[str, MemoryUse]:
        """Memory by phase, in the order of the run, without the phases on the CPU."""
        training = self.training
        on_the_cpu = {"t5"} if self.inputs.config.model.t5_device == "cpu" else set()
        found = {f"encode {LABELS[name]}": use for name, use in self.encoding.items() if name not in on_the_cpu}
        if self.drawing is not None:
            found["draw class images"] = self.drawing
        resident, encoding = training.resident, 0
        if self.inputs.config.data.streams:  # the encoders stay
            live = [use for name, use in self.encoding.items() if name not in on_the_cpu]
            resident += sum(use.resident for use in live)
            encoding = max(use.working for use in live)
        found["train"] = MemoryUse(resident, training.working + encoding)
        if training.preview is not None:
            found["preview"] = MemoryUse(resident, training.preview)
        if self.inputs.config.eval is not None:
            found["evaluate"] = MemoryUse(resident, ENCODER)
        return found

    @functools.cached_property
    def flops(self) -> float:
        """Operations of an optimizer step: the mean over the sizes of the run, by their samples."""
        inputs, mix = self.inputs, self.inputs.mix
        method = METHODS[inputs.config.method.kind](inputs.config, inputs.base)

        def of_size(size: Size) -> int:
            if size == inputs.largest:
                return self.training.flops
            return rehearse_training(inputs.config, inputs.base, method, size, inputs.dtype, self.training).flops

        return sum(of_size(size) * samples for size, samples in mix.items()) / sum(mix.values())

    @functools.cached_property
    def store(self) -> Store | None:
        """Size of the store; None if the images are missing, and for streams."""
        inputs = self.inputs
        method = METHODS[inputs.config.method.kind](inputs.config, inputs.base)
        if inputs.records is None or inputs.config.data.streams:
            return None
        return _store(inputs, inputs.records, method.cached_encoders)

    @property
    def peak(self) -> int:
        return max(use.peak for use in self.phases.values())

    @property
    def needed(self) -> int:
        """The peak plus allowances, in bytes."""
        return round(self.peak * (1 + MARGIN)) + CONTEXT


LABELS = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5", "vae": "images"}


def forecast_inputs(
    config: Config, dtype: torch.dtype, world: int = 1, loaded: Sequence[Record] | None = None
) -> ForecastInputs:
    """Return the inputs of a forecast. Raises UserError as preflight does, but not for missing images.

    `world` is the number of processes; `loaded` are the records of the sources, if they were read before.
    """
    check_installed(config)
    base = shape_of_base(config.model, config.seed)
    config = with_base_sampling(config, base)
    transformer = empty_transformer(base)
    check_size(config, transformer.config)
    check_precision(config, dtype)
    METHODS[config.method.kind](config, base).select(transformer)
    tables = bucket_tables(config, transformer.config)
    buckets = buckets_in(tables)
    records: list[Record] | None = None
    holdout: list[Record] = []
    sized: list[Record] = []
    priors: list[PlannedPrior] = []
    evaluated: Prompts | None = None
    missing: Sequence[str] = ()
    used = buckets
    try:
        loaded = load_of(config) if loaded is None else loaded
        if config.data.streams:
            check_stream(config, world=1)
        records, holdout = split_records(config, list(loaded))
        config = with_captions(config, records)
        sized, holdout = in_all_sizes(config.data, records, tables), held_out_size(config.data, holdout, tables)
        records = used_images(records, sized)
        config = resolve_epochs(config, sum(record.repeats for record in sized), world)
        priors = plan_priors(config, sized, buckets, base)
        evaluated = evaluated_prompts(config, records)
        used = [bucket_of(record, buckets) for record in sized] or buckets
    except DataError as error:
        records, sized, missing = None, [], error.problems
    return ForecastInputs(
        config=config,
        base=base,
        dtype=dtype,
        buckets=buckets,
        sized=sized,
        largest=largest_bucket(used),
        records=records,
        holdout=holdout,
        priors=priors,
        evaluated=evaluated,
        missing=missing,
        world=world,
        loaded=loaded,
    )


def forecast(inputs: ForecastInputs, like: Forecast | None = None) -> Forecast:
    """Rehearse each phase of a run; phases with the same settings are taken from `like`."""
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
        training = _on_each_process(inputs, rehearse_training(config, base, method, largest, dtype, previewed))
    return Forecast(
        inputs=inputs,
        encoding=encoded.encoding if encoded else _encoding(inputs, method),
        drawing=drawing,
        training=training,
    )


def _on_each_process(inputs: ForecastInputs, training: Training) -> Training:
    """Return the memory of the process with the most, if they divide the model."""
    config, base = inputs.config, inputs.base
    if config.train.sharding == "none" or inputs.world == 1:
        return training
    method = METHODS[config.method.kind](config, base)
    transformer = loaded_shape(config, base, method, inputs.dtype, empty_transformer(base))
    modules = () if config.method.freezes_base else method.select(transformer)
    trained = [
        f"{module}.{name}"
        for module in modules
        for name, _ in transformer.get_submodule(module).named_parameters(recurse=False)
    ]
    return divided(training, transformer, trained, inputs.world)


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
    """Compute the size of the store as `encode_captions` and `encode_images` do, without file headers.

    Copies of an image count twice, as their bytes are not compared.
    """
    config = inputs.config
    of_class = [record for prior in inputs.priors for record in prior.records]
    captions = captions_to_encode(records, [*inputs.holdout, *of_class])
    prompts = prompts_to_encode(config, bool(inputs.priors), inputs.evaluated)
    read = {encoder: texts_read_by(encoder, prompts, captions) for encoder in encoders}
    of_texts = sum(
        text_bytes(inputs.base, encoder, inputs.dtype, config.model.t5_lengths) * len(texts)
        for encoder, texts in read.items()
    )
    cuts_of = [(record, [cut.size for cut in _cuts(inputs, record)]) for record in inputs.sized]
    cuts_of += [(record, [bucket_of(record, inputs.buckets)]) for record in inputs.holdout]
    sizes = [size for _, cuts in cuts_of for size in cuts] + [inputs.largest] * len(of_class)
    masked = [size for record, cuts in cuts_of if record.mask for size in cuts]
    pixels = sum(height * width for height, width in sizes)
    nbytes = of_texts + round(pixels * bytes_per_pixel(inputs.base)) + sum(map(mask_bytes, masked))
    return Store(len({text for texts in read.values() for text in texts}), len(sizes), len(masked), nbytes)


def _cuts(inputs: ForecastInputs, record: Record) -> set[Crop]:
    """Return the distinct crops and flips of an image. If its shape is the bucket's, all random crops are equal."""
    data, target = inputs.config.data, bucket_of(record, inputs.buckets)
    digest = file_digest(record.image) if data.crop_variants > 1 else ""  # seeds the random crops
    return set(crops(record.upright_size, target, data.crop_variants, data.flip, digest))

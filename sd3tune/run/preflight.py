"""Checks of a run before anything is loaded, encoded or written."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel

from sd3tune.config import Config
from sd3tune.config.sections.data import DataConfig, FolderSource
from sd3tune.config.sections.flow import FlowConfig
from sd3tune.data.buckets import Size
from sd3tune.data.records import Record, load_records
from sd3tune.data.seeds import derive
from sd3tune.data.stream.shards import Shard
from sd3tune.errors import ConfigError, DataError, Problems, RunError
from sd3tune.measures.prompts import Prompts
from sd3tune.methods import METHODS, Method
from sd3tune.model.base.base import Base
from sd3tune.model.base.resolve import configured_base
from sd3tune.model.load.components import empty_transformer, load_scheduler
from sd3tune.model.load.quantized import missing_library
from sd3tune.model.lora.targets import CoverageRow
from sd3tune.publish.files import ADAPTERS
from sd3tune.publish.repository import repository_of
from sd3tune.run.base_sampling import with_base_sampling
from sd3tune.run.buckets import Tables, bucket_of, bucket_tables, buckets_in, largest_bucket, largest_side
from sd3tune.run.evaluated import evaluated_prompts
from sd3tune.run.folder import check_disk_space, starting_checkpoint
from sd3tune.run.priors import PlannedPrior, plan_priors, with_captions
from sd3tune.run.saved import with_saved_base
from sd3tune.run.sizes import held_out_size, in_all_sizes, samples_of, used_images
from sd3tune.run.stream_checks import check_stream, load_of
from sd3tune.runtime.device import choose_dtype, gpu_of
from sd3tune.tracking.trackers import missing_packages
from sd3tune.training.objective import share_inside, shift_at
from sd3tune.training.optimizers import OPTIMIZERS

_MIN_SHARE = 1e-6


@dataclass(frozen=True)
class OptimizerFallback:
    """The use of another optimizer, as the configured one fails on this machine."""

    asked: str
    """The kind that was configured; `Plan.config` has the one in use."""
    reason: str


@dataclass(frozen=True)
class Plan:
    """A run that passed all checks that need no weights."""

    config: Config
    """The configuration, with `train.epochs` resolved into `train.steps`, and the base's sampling in `preview`."""
    run: Path
    base: Base
    records: Sequence[Record]
    """The training images."""
    sized: Sequence[Record]
    """A record for each training image and size; equal to `records` in a run with a single size."""
    holdout: Sequence[Record]
    """Records for the held-out loss; none is trained on."""
    method: Method
    modules: Sequence[str]
    coverage: Sequence[CoverageRow]
    device: torch.device
    dtype: torch.dtype
    model_shift: float
    """The base scheduler's own sigma shift."""
    shift: float
    """The effective shift at the largest size: the configured number, or derived from the base's own."""
    shifts: Mapping[Size, float]
    """Bucket -> the effective shift of its size."""
    start: Path | None
    """The checkpoint to resume from."""
    buckets: Sequence[Size]
    """Bucket sizes, (height, width) in pixels."""
    priors: Sequence[PlannedPrior]
    """Class images of each source that uses them."""
    evaluated: Prompts | None = None
    """The prompts of `eval`; None if it is off."""
    shards: Sequence[Shard] = ()
    """The shards of a run on streams, which has no `records`."""
    optimizer_fallback: OptimizerFallback | None = None
    """None if the configured optimizer is used."""
    warnings: Sequence[str] = ()
    """Warnings about skipped files and surprising readings of the data."""

    @property
    def images_per_epoch(self) -> int:
        return sum(record.repeats for record in self.sized)

    @property
    def largest(self) -> Size:
        """The bucket in use with the most pixels, (height, width); of all buckets for a stream."""
        return largest_bucket([bucket_of(record, self.buckets) for record in self.sized] or self.buckets)


def make_plan(config: Config, device: torch.device, resume: bool | None, world: int = 1) -> Plan:
    """Check data, base, targets, sizes and, unless `resume` is None, the run folder.

    `world` is the number of processes that will train. Raises UserError with every problem found.
    """
    problems, warnings = Problems(missing_packages(config.tracking)), list[str]()
    if resume is not None:
        problems += _upload_problems(config)
    records, holdout = list[Record](), list[Record]()
    shards: Sequence[Shard] = ()
    start: Path | None = None
    evaluated: Prompts | None = None
    run = Path(str(config.output_dir))
    with problems.collected():
        loaded = load_of(config, warnings.append)
        shards = check_stream(config, world) if config.data.streams else ()
        records, holdout = split_records(config, loaded, warnings.append)
        config = with_captions(config, records)
        if config.data.enlarges:  # else images may be too small for a size
            config = resolve_epochs(config, samples_of(config.data, records), world)
    with problems.collected():
        evaluated = evaluated_prompts(config, records) if records or shards else None
    with problems.collected():
        check_installed(config)
        start = None if resume is None else starting_checkpoint(run, resume)
        config = with_saved_base(config, start) if start else config
    with problems.collected():
        model = _check_model(config, device, records, problems)
        config = with_base_sampling(config, model.base)
        sized = in_all_sizes(config.data, records, model.tables, warnings.append)
        holdout = held_out_size(config.data, holdout, model.tables)
        if records and not config.data.enlarges:
            config = resolve_epochs(config, sum(record.repeats for record in sized), world)
        priors = plan_priors(config, sized, buckets_in(model.tables), model.base, warnings.append)
    problems.raise_if_any()
    coverage = model.method.coverage(model.transformer)
    if resume is not None:
        check_disk_space(run, _bytes_to_save(config, model.method, sum(row.parameters for row in coverage), start))
    scheduler_shift = float(load_scheduler(model.base).config.shift)
    shifts = shifts_of(config.flow, scheduler_shift, model.tables)
    return Plan(
        config=config,
        run=run,
        base=model.base,
        records=used_images(records, sized),
        sized=sized,
        holdout=holdout,
        method=model.method,
        modules=model.modules,
        coverage=coverage,
        device=device,
        dtype=model.dtype,
        model_shift=scheduler_shift,
        shift=shifts[model.tables[config.data.side][0]],
        shifts=shifts,
        start=start,
        buckets=buckets_in(model.tables),
        priors=priors,
        shards=shards,
        evaluated=evaluated,
        warnings=list(dict.fromkeys(warnings)),
    )


@dataclass(frozen=True)
class _Model:
    """The base, its transformer on the meta device, and what will be trained on it."""

    base: Base
    transformer: SD3Transformer2DModel
    method: Method
    modules: Sequence[str]
    dtype: torch.dtype
    tables: Tables


def _check_model(config: Config, device: torch.device, records: Sequence[Record], problems: Problems) -> _Model:
    """Find the base, and check targets, captions, sizes and precision. Adds `problems`, and raises UserError."""
    base = configured_base(config.model, config.seed)
    transformer = empty_transformer(base)
    method = METHODS[config.method.kind](config, base)
    base.check_encoders(method.cached_encoders)
    modules = method.select(transformer)
    texts = {text for record in records for caption in record.drawn for text in caption.texts}
    problems += method.problems_of(texts) if records else ()
    check_size(config, transformer.config)
    dtype = choose_dtype(config.model.dtype, gpu_of(device))
    check_precision(config, dtype)
    return _Model(base, transformer, method, modules, dtype, bucket_tables(config, transformer.config))


def _upload_problems(config: Config) -> Sequence[str]:
    repository = repository_of(config.hub)
    try:
        with explain_hub_push():
            if repository is not None:
                repository.check_token()
    except RunError as error:
        return error.problems
    return ()


@contextlib.contextmanager
def explain_hub_push() -> Iterator[None]:
    """Extend a RunError about uploads with a way to train without one: set hub.push=never, and push later."""
    try:
        yield
    except RunError as error:
        lines = (f"hub.push: {line}; or set hub.push=never, and `sd3tune hub push` it later" for line in error.problems)
        raise RunError(*lines) from None


def _bytes_to_save(config: Config, method: Method, parameters: int, start: Path | None) -> int:
    """Return the minimum bytes that a run writes: exports and checkpoints; when it resumes, one checkpoint."""
    average = config.ema is not None
    in_checkpoint = 4 * (1 + 2 + average) + method.exported_bytes  # master, Adam's moments and the average are fp32
    saved = 1 if start else min(config.checkpoint.keep, math.ceil(config.train.total_steps / config.checkpoint.every))
    measured = 0  # a resumed run has written some
    if config.eval is not None and method.product.name == ADAPTERS[0] and start is None:
        measured = math.ceil(config.train.total_steps / config.eval.every)
    return parameters * (in_checkpoint * saved + method.exported_bytes * (1 + average + measured))


def split_records(
    config: Config, records: list[Record], warn: Callable[[str], None] = lambda line: None
) -> tuple[list[Record], list[Record]]:
    """Return training and held-out records. Raises DataError if either would be without images."""
    holdout = config.validation.holdout
    if isinstance(holdout, str):
        first = config.data.sources[0]
        folder = FolderSource(
            path=holdout,
            caption=first.caption,
            trigger=first.trigger,
            captions=first.captions,
            wildcards=first.wildcards,
            masks=first.masks if first.masks in ("alpha", "off") else None,
            template=first.template,
        )
        try:
            return records, load_records(DataConfig(sources=[folder], trigger=config.data.trigger), warn=warn)
        except DataError as error:
            raise DataError(*(f"validation.holdout: {problem}" for problem in error.problems)) from None
    if not holdout:
        return records, []
    if holdout >= len(records):
        images = "1 image" if len(records) == 1 else f"{len(records)} images"
        raise DataError(f"validation.holdout: {holdout} of {images} would leave none to train on")
    lots = sorted(range(len(records)), key=lambda index: derive(0, "holdout", index))
    held = set(lots[:holdout])
    return (
        [record for index, record in enumerate(records) if index not in held],
        [record for index, record in enumerate(records) if index in held],
    )


def check_installed(config: Config) -> None:
    """Raise RunError if a quantization or optimizer library of the configuration is missing."""
    missing = [
        line
        for name, form in config.model.fewer_bits.items()
        for line in missing_library(f"model.{name}: {form}", form)
    ]
    if missing:
        raise RunError(*missing)
    kind = config.optimizer.kind
    extra, needed = OPTIMIZERS[kind].package, OPTIMIZERS[kind].torch_class
    if needed is not None and not hasattr(torch.optim, needed[0]):
        raise RunError(
            f"optimizer.kind: {kind} needs torch {needed[1]} or later, for torch.optim.{needed[0]}, and this is torch "
            f"{torch.__version__}; update torch or set optimizer.kind=adamw"
        )
    if extra is not None and importlib.util.find_spec(extra) is None:
        raise RunError(f"optimizer.kind: {kind} needs {extra}: pip install 'sd3tune[{extra}]'")


def resolve_epochs(config: Config, images_per_epoch: int, world: int) -> Config:
    """Return the configuration with epochs as steps, rounded up. Raises ConfigError if the warm-up does not fit."""
    train = config.train
    if train.epochs is None:
        return config
    batch = train.batch_size * train.gradient_accumulation * world
    steps = math.ceil(Fraction(repr(train.epochs)) * images_per_epoch / batch)  # exact: 0.1 means a tenth
    if not config.warmup_fits(steps):
        raise ConfigError(
            f"schedule.warmup_steps is {config.schedule.warmup_steps} but train.epochs {train.epochs:g} is {steps} "
            f"step{'s' * (steps > 1)}: the learning rate would never reach its peak; warm up for fewer steps"
        )
    return config.model_copy(update={"train": train.model_copy(update={"steps": steps, "epochs": None})})


def check_size(config: Config, transformer: Mapping[str, Any]) -> None:
    """Raise ConfigError if the base has too few blocks to checkpoint or swap, or cannot take the resolution."""
    there = int(transformer["num_layers"])
    for name, otherwise in (("checkpointed_blocks", "null for all"), ("swap_blocks", "null for none")):
        blocks = getattr(config.train, name)
        if blocks is not None and blocks > there:
            raise ConfigError(f"train.{name}: {blocks} of {there} blocks; at most {there}, or {otherwise}")
    largest = largest_side(transformer)
    for number, source in enumerate(config.data.sources):
        key = "data.resolution" if source.resolution is None else f"data.sources.{number}.resolution"
        for side, _ in config.data.sizes_of(number):
            if side > largest:
                raise ConfigError(f"{key}: {side} is too large for this base; at most {largest}")
    for number, picture in enumerate(config.preview.pictures):
        where = f"preview.prompts.{number}"
        if picture.sides and max(picture.sides) > largest:
            raise ConfigError(f"{where}.size: {picture.size} is too large for this base; at most {largest}")
        if picture.slg is not None and max(picture.slg_layers) >= there:
            layers = ", ".join(map(str, picture.slg_layers))
            raise ConfigError(f"{where}.slg_layers: {layers}: this base has the blocks 0 to {there - 1}")


def check_precision(config: Config, dtype: torch.dtype) -> None:
    """Raise ConfigError if `train.fused_backward` cannot be combined with the resolved precision."""
    if config.train.fused_backward and dtype is torch.float16:
        raise ConfigError(
            "train.fused_backward: fp16 overflows in some steps, which must be skipped; set model.dtype to bf16 or "
            "fp32, or leave train.fused_backward out"
        )


def shifts_of(flow: FlowConfig, model_shift: float, tables: Tables) -> dict[Size, float]:
    """Return bucket -> effective shift of its size. Raises ConfigError for bounds without sigmas between them."""
    shifts = dict[Size, float]()
    for side, buckets in tables.items():
        shift = shift_at(flow, model_shift, side**2)
        _check_sigmas(flow, shift)
        shifts |= dict.fromkeys(buckets, shift)
    return shifts


def _check_sigmas(flow: FlowConfig, shift: float) -> None:
    """Raise ConfigError if almost no sigma falls between the bounds: rounding would make them all equal."""
    share = share_inside(flow, shift)
    if share < _MIN_SHARE:
        raise ConfigError(
            f"flow.min_sigma {flow.min_sigma:g} and flow.max_sigma {flow.max_sigma:g}: {flow.timesteps.kind} with "
            f"shift {shift:.3g} draws almost nothing between them ({share:.1g} of all sigmas); widen them"
        )

"""`sd3tune plan`: forecast a run's memory, disk space and time, and the savings of each configuration change."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch

from sd3tune.config import Config
from sd3tune.errors import ConfigError
from sd3tune.forecast.fitting import changes, describe, fit, memory_budget
from sd3tune.forecast.forecast import CONTEXT, MARGIN, Forecast, ForecastInputs, forecast, forecast_inputs
from sd3tune.forecast.gpus import GpuSpec, find_gpu
from sd3tune.forecast.knobs import after, knobs
from sd3tune.forecast.rehearsal import Training
from sd3tune.forecast.system import SystemMemory, machine_memory, system_memory
from sd3tune.methods import METHODS
from sd3tune.reporting import Lines
from sd3tune.run.captions import describe_captions
from sd3tune.run.describe import describe_hoist, describe_precision
from sd3tune.runtime.device import DTYPES, choose_dtype, dtype_name, gpu_of

UTILISATION = 40
"""Assumed share of the GPU's peak throughput that training reaches, in per cent."""


@dataclass(frozen=True)
class RunPlan:
    """Forecast of a run: figures, and the text that `sd3tune plan` prints. Memory and disk space are in bytes."""

    lines: Lines
    forecast: Forecast
    room: int | None
    """The memory to fit into: the GPU's or the given number; None without either."""
    step_seconds: float | None
    """Seconds per step; None unless a GPU was named, and in fp32."""
    system: SystemMemory
    """System memory: `system.needed`, with an allowance, and by phase."""

    @property
    def config(self) -> Config:
        """The planned configuration; with `train.memory`, after the changes that make it fit."""
        return self.forecast.inputs.config

    @property
    def needed(self) -> int:
        """Peak memory with allowances."""
        return self.forecast.needed

    @property
    def fits(self) -> bool | None:
        """True if the run fits into `room`; None without `room`."""
        return None if self.room is None else self.needed <= self.room

    @property
    def steps(self) -> int | None:
        """Number of optimizer steps; None if `train.epochs` is set and the images are not there yet."""
        return self.config.train.steps

    @property
    def store(self) -> int | None:
        """Disk space of the encoded data; None if the images are not there yet."""
        return None if self.forecast.store is None else self.forecast.store.nbytes

    @property
    def phases(self) -> list[dict[str, str | int]]:
        """Memory of each phase, in order, as rows with `phase`, `resident`, `working`, `peak` and `system`."""
        return [
            {"phase": name, "resident": use.resident, "working": use.working, "peak": use.peak, "system": system}
            for name, use, system in self.system.rows(self.forecast)
        ]

    def __str__(self) -> str:
        return str(self.lines)

    def _repr_html_(self) -> str:
        return self.lines._repr_html_()


def make_run_plan(
    config: Config,
    card: str | None = None,
    memory: float | None = None,
    utilisation: float = UTILISATION,
    processes: int = 1,
) -> RunPlan:
    """Return the figures and the text of the plan; arguments are those of `plan_lines`. Raises UserError."""
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"memory={memory:g}: give the card's memory in GB, such as 24")
    if not 0 < utilisation <= 100:
        raise ConfigError(f"utilisation={utilisation:g}: give a percentage of the card's peak, above 0, at most 100")
    lines: list[str] = []
    remaining = plan_lines(config, card, memory, utilisation, processes)
    while True:
        try:
            lines.append(next(remaining))
        except StopIteration as end:
            plan, found, room, system = end.value
            seconds = step_seconds(plan, found, utilisation)
            return RunPlan(Lines(lines), plan, None if room is None else round(room * 1e9), seconds, system)


def plan_lines(
    config: Config,
    card: str | None = None,
    memory: float | None = None,
    utilisation: float = UTILISATION,
    processes: int = 1,
) -> Generator[str, None, tuple[Forecast, GpuSpec | None, float | None, SystemMemory]]:
    """Yield the lines of the plan; return the forecast, the GPU, the memory to fit into, and the system memory.

    `memory`, given and returned, is in GB (10^9 bytes); `utilisation` is in per cent of the GPU's peak throughput.
    With several `processes`, memory and time are those of each.
    Raises UserError.
    """
    found = None if card is None else find_gpu(card)
    inputs = forecast_inputs(config, planned_dtype(config, found, memory), processes)
    for_this_machine = found is None and memory is None
    if for_this_machine and not torch.cuda.is_available():
        precision = dtype_name(inputs.dtype)
        yield f"note: there is no GPU here, so this plan is for the CPU, in {precision}; for a GPU: --card 4090"
    yield from (
        f"note: no images yet ({problem}): the plan assumes the largest bucket" for problem in inputs.missing[:1]
    )
    if config.train.sharding != "none" and processes == 1:
        yield "note: train.sharding has no effect with one process; to plan for several: --num-processes N"
    room = memory if memory is not None or found is None else found.memory
    wanted = config.train.memory
    if wanted is None:
        yield from _base_lines(inputs)
        plan = forecast(inputs)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plan = fit(
            inputs, round(room * 1e9) if room is not None and wanted == "auto" else memory_budget(wanted, device)
        )
        yield describe(config, plan)
        yield from _base_lines(plan.inputs)
    system = system_memory(plan, for_this_machine and not torch.cuda.is_available())
    yield from _memory_lines(plan, system)
    yield from system.problems(machine_memory()) if for_this_machine else ()
    if room is not None:
        yield _verdict(plan, room, found.name if found and memory is None else "--memory")
    yield from _length_lines(plan, found, utilisation)
    yield ""
    yield from _knob_lines(plan, found, room)
    if room is not None and plan.needed > room * 1e9 and wanted is None and config.train.sharding == "none":
        yield ""
        yield _what_fits(plan, room)
    return plan, found, room, system


def planned_dtype(config: Config, card: GpuSpec | None, memory: float | None) -> torch.dtype:
    """Resolve `model.dtype` for the GPU; with `memory` alone, for any GPU with bf16; else for this machine."""
    wanted = config.model.dtype
    if card is not None and not card.bf16:
        if wanted == "bf16":
            raise ConfigError(f"model.dtype: bf16: a {card.name} has no bf16; use fp16 or auto")
        return DTYPES["fp16" if wanted == "auto" else wanted]
    if card is not None or memory is not None:
        return DTYPES["bf16" if wanted == "auto" else wanted]
    return choose_dtype(wanted, gpu_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def _base_lines(inputs: ForecastInputs) -> list[str]:
    height, width = inputs.largest
    train = inputs.config.train
    checkpointing: str = train.gradient_checkpointing
    if train.checkpointed_blocks is not None:
        checkpointing += f" of {train.checkpointed_blocks} blocks"
    if train.swap_blocks is not None:
        checkpointing += f", {train.swap_blocks} blocks swapped"
    batch = f"batch {train.batch_size}" + f" x {train.gradient_accumulation}" * (train.gradient_accumulation > 1)
    return [
        f"base      {inputs.base.name}, {describe_precision(inputs.config, inputs.dtype)}",
        f"largest   {width}x{height} px, {batch}, gradient checkpointing {checkpointing}",
        *describe_hoist(inputs.config),
        *_process_lines(inputs),
    ]


def _process_lines(inputs: ForecastInputs) -> list[str]:
    if inputs.world == 1:
        return []
    divides = "; they divide the transformer's blocks" if inputs.config.train.sharding != "none" else ""
    return [f"processes {inputs.world}{divides}; memory and time are those of each"]


def gigabytes(nbytes: float) -> str:
    """Format bytes as `4.94 GB`, in powers of ten; small numbers as MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _memory_lines(plan: Forecast, system: SystemMemory) -> list[str]:
    training, phases = plan.training, plan.phases
    worst = max(phases, key=lambda name: phases[name].peak)
    lines = ["", f"{'memory':<20}{'resident':>12}{'working':>12}{'together':>12}{'system':>12}"]
    for name, use, of_system in system.rows(plan):
        sizes = (use.resident, use.working, use.peak, of_system)
        lines.append(f"{name:<20}" + "".join(f"{gigabytes(nbytes):>12}" for nbytes in sizes))
    lines += ["", "while training"]
    live = ("text encoders and VAE, for the stream", phases["train"].peak - training.peak)
    lines += [f"  {name:<46}{gigabytes(nbytes):>12}" for name, nbytes in [*components(training), live] if nbytes]
    return [
        *lines,
        "",
        f"peak      {gigabytes(plan.peak)}: {worst}; with allowances {gigabytes(plan.needed)} "
        f"({MARGIN:.0%} for fragmentation and workspaces, {CONTEXT / 1e9:g} GB for CUDA itself)",
        system.describe(),
    ]


def components(training: Training) -> list[tuple[str, int]]:
    """Return the parts of training memory, each with its bytes, which add up to the peak."""
    millions = f"{training.trained / 1e6:.1f} M"
    return [
        (f"base, frozen (of {training.parameters / 1e9:.3f} B parameters)", training.frozen),
        ("trained text encoders, frozen", training.encoders),
        (f"trainable parameters, {millions}, for computing", training.compute),
        ("their fp32 master", training.master),
        ("their gradients' fp32 sum", training.gradient),
        ("the optimizer's state", training.optimizer),
        ("their average (EMA)", training.average),
        ("adaLN modulations, computed ahead", training.ahead),
        ("a gathered block, and the buffer of the next", training.gathered),
        ("activations saved for the backward pass", min(training.saved, training.working)),
        ("everything else at the peak", max(0, training.working - training.saved)),
    ]


def _verdict(plan: Forecast, room: float, name: str) -> str:
    left = room * 1e9 - plan.needed
    which = f"{room:g} GB" + f" ({name})" * (name != "--memory")
    if left >= 0:
        return f"fits      into {which}: yes, {gigabytes(left)} to spare"
    return f"fits      into {which}: no, {gigabytes(-left)} too much"


def _what_fits(plan: Forecast, room: float) -> str:
    """Return the settings that fit together, as `train.memory` would choose them, or why there are none."""
    try:
        found = fit(plan.inputs, round(room * 1e9))
    except ConfigError as error:
        return f"to fit    no settings do; {error.problems[0]}"
    return f"to fit    train.memory={room:g}, or {changes(plan.inputs.config, found)}: {gigabytes(found.needed)} in all"


def _length_lines(plan: Forecast, card: GpuSpec | None, utilisation: float) -> list[str]:
    train, store = plan.inputs.config.train, plan.store
    batch = train.batch_size * train.gradient_accumulation * plan.inputs.world
    lines = []
    if store is not None:
        lines.append(
            f"store     {gigabytes(store.nbytes)}: {store.texts} texts and {store.images} images"
            + f" with {store.masks} masks" * (store.masks > 0)
            + ", encoded once"
        )
        inputs = plan.inputs
        encoders = METHODS[inputs.config.method.kind](inputs.config, inputs.base).cached_encoders
        lines += describe_captions(inputs.config, inputs.records or (), inputs.base, encoders, inputs.dtype)
    if train.steps is None:
        lines.append("steps     not known yet: train.epochs needs the images")
    else:
        lines.append(f"steps     {train.steps} x {batch} image{'s' * (batch > 1)}, {train.steps * batch} images seen")
    lines += _evaluation_lines(plan)
    on_average = f", on average over {len(plan.inputs.mix)} sizes" if len(plan.inputs.mix) > 1 else ""
    lines.append(f"compute   {plan.flops / 1e12:.3g} TFLOP a step{on_average}")
    seconds = step_seconds(plan, card, utilisation)
    if seconds is not None and card is not None:
        whole = (
            "" if train.steps is None else f", {duration(seconds * train.steps)} in all, encoding and previews aside"
        )
        lines.append(
            f"time      {duration(seconds)} a step{whole}: at {utilisation:g} % of the {card.tflops:g} TFLOP/s of "
            f"{card.name}, which is an assumption"
        )
    return lines


def _evaluation_lines(plan: Forecast) -> list[str]:
    """Return the line with the number of pictures that `eval` draws; empty if it is off."""
    config, prompts = plan.inputs.config, plan.inputs.evaluated
    if config.eval is None or prompts is None or config.train.steps is None:
        return []
    each = (len(prompts.scored) + len(prompts.of_class)) * config.eval.seeds
    times = math.ceil(config.train.steps / config.eval.every)
    return [
        f"evaluate  {times} x {each} pictures, and {each} of the base, each of {config.preview.steps} denoising steps: "
        "training waits for them"
    ]


def step_seconds(plan: Forecast, card: GpuSpec | None, utilisation: float) -> float | None:
    """Return seconds per step at a share of the GPU's peak; None without a GPU and in fp32, whose peak is unknown."""
    if card is None or plan.inputs.dtype is torch.float32:
        return None
    return plan.flops / (card.tflops * 1e12 * utilisation / 100)


def duration(seconds: float) -> str:
    """Format seconds as `0.42 s`, `7 min` or `1.5 h`."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _knob_lines(plan: Forecast, card: GpuSpec | None, room: float | None) -> Iterator[str]:
    """Yield one line per change: peak memory of the run and of training, and TFLOP per step with its change in %."""
    yield f"{'after one change':<50}{'peak':>10}{'training':>12}{'TFLOP':>9}{'change':>8}"
    today = plan.flops
    for typed, changed in [("as it is", None), *knobs(plan.inputs)]:
        other = plan if changed is None else forecast(after(plan.inputs, changed), plan)
        fits = "" if room is None else ("  fits" if other.needed <= room * 1e9 else "  too much")
        yield (
            f"{typed:<50}{gigabytes(other.peak):>10}{gigabytes(other.training.peak):>12}"
            f"{other.flops / 1e12:>9.3g}{f'{other.flops / today - 1:+.0%}':>8}{fits}"
        )

"""Fitting a run into `train.memory`, at the least cost in time and precision.

Model, objective and the images of an optimizer step stay the same. The order of trials is: the configuration itself;
selective checkpointing of a quarter, half, three quarters and all of the blocks; full checkpointing of every block; the
same with a quarter, half, three quarters and all of the blocks swapped; all of these with the base in 4 bits. Each
trial uses the largest micro-batch that fits and divides the step's images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sd3tune.config import Config
from sd3tune.config.sections.model import ModelConfig
from sd3tune.errors import ConfigError
from sd3tune.forecast.forecast import CONTEXT, MARGIN, Forecast, ForecastInputs, forecast
from sd3tune.forecast.system import machine_memory
from sd3tune.model.compute.swap import BUFFERS
from sd3tune.reporting import progress_bar
from sd3tune.run.preflight import Plan
from sd3tune.runtime.processes import Processes

KEY = "train.memory"


def memory_budget(memory: float | str, device: torch.device) -> int:
    """Return `train.memory` in bytes; `auto` is the free memory of the GPU or, on the CPU, all memory.

    Memory that this process has reserved counts as free, and so does the allowance for CUDA itself.
    """
    if not isinstance(memory, str):
        return round(memory * 1e9)
    if device.type == "cuda":
        before = torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)  # creates CUDA's context, which the allowance includes
        return min(free + before + CONTEXT, total)
    return machine_memory()


def fitted_plan(plan: Plan, processes: Processes) -> tuple[Plan, list[str]]:
    """Return the plan fitted into `train.memory` and a line about it; the plan itself and no line without a budget.

    All processes use the same settings, fitted to the GPU with the least free memory.
    """
    memory = plan.config.train.memory
    if memory is None:
        return plan, []
    inputs = ForecastInputs(
        config=plan.config,
        base=plan.base,
        dtype=plan.dtype,
        buckets=plan.buckets,
        sized=plan.sized,
        largest=plan.largest,
        records=plan.records,
        holdout=plan.holdout,
        priors=plan.priors,
        evaluated=plan.evaluated,
        missing=(),
    )
    budget = torch.tensor(memory_budget(memory, plan.device), device=plan.device)
    found = fit(inputs, min(processes.gather(budget).tolist()), quiet=not processes.is_main)
    return replace(plan, config=found.inputs.config), [describe(inputs.config, found)]


def fit(inputs: ForecastInputs, budget: int, quiet: bool = False) -> Forecast:
    """Return the forecast of the first configuration that needs at most `budget` bytes. Raises ConfigError."""
    estimate = forecast(inputs)
    t5 = estimate.encoding.get("t5")
    if t5 is not None and t5.peak * (1 + MARGIN) + CONTEXT > budget:
        inputs = _changed(inputs, "model", t5_device="cpu")
        estimate = forecast(inputs, estimate)
    given_up: tuple[ModelConfig, int | None] | None = None
    bar = progress_bar(
        list(leaner_configurations(inputs)),
        desc="fitting into memory",
        unit="way",
        leave=False,
        delay=2,
        disable=quiet,
    )
    for leaner in bar:
        if _what_stays(leaner.config) == given_up:
            continue
        found = None
        for split in _batch_splits(leaner):
            estimate = forecast(split, estimate)
            if estimate.needed > budget:
                break
            found = estimate
        if _checkpointing_cannot_help(estimate, budget):
            given_up = _what_stays(leaner.config)
        if found is not None:
            return found
    worst = max(estimate.phases, key=lambda name: estimate.phases[name].peak)
    raise ConfigError(
        f"{KEY}: {budget / 1e9:.3g} GB cannot hold this run: the minimum is {estimate.needed / 1e9:.3g} GB "
        f"(to {worst}); lower data.resolution, or raise train.memory"
    )


def _what_stays(config: Config) -> tuple[ModelConfig, int | None]:
    """Return the settings of memory that checkpointing cannot reduce."""
    return config.model, config.train.swap_blocks


def _checkpointing_cannot_help(estimate: Forecast, budget: int) -> bool:
    """Return whether the memory that checkpointing cannot reduce already exceeds the budget."""
    other = max(use.peak for name, use in estimate.phases.items() if name != "train")
    return max(other, estimate.training.resident) * (1 + MARGIN) + CONTEXT > budget


def describe(config: Config, found: Forecast) -> str:
    """Return a line with the needed memory and the changed settings."""
    chosen = changes(config, found) or "the configuration as it is"
    return f"memory    {found.needed / 1e9:.3g} GB is enough, with {chosen}"


def changes(config: Config, found: Forecast) -> str:
    """Return the settings in which the forecast's configuration differs from `config`, as `section.key=value`."""
    before, after = config.model_dump(), found.inputs.config.model_dump()
    return " ".join(
        f"{section}.{key}={value}"
        for section, values in after.items()
        if values != before[section]
        for key, value in values.items()
        if value != before[section][key]
    )


def _changed(inputs: ForecastInputs, section: str, **values: Any) -> ForecastInputs:
    changed = getattr(inputs.config, section).model_copy(update=values)
    return replace(inputs, config=inputs.config.model_copy(update={section: changed}))


def leaner_configurations(inputs: ForecastInputs) -> Iterator[ForecastInputs]:
    """Yield configurations of the same training that need less and less memory."""
    yield inputs
    blocks = inputs.base.config("transformer")["num_layers"]
    some = dict.fromkeys(-(-blocks * quarters // 4) for quarters in (1, 2, 3))
    steps = [("selective", count) for count in some] + [("selective", None), ("block", None)]
    if inputs.config.train.gradient_checkpointing != "none":
        steps = [("block", None)]
    for kind, count in steps:
        yield _changed(inputs, "train", gradient_checkpointing=kind, checkpointed_blocks=count)
    if not inputs.config.method.freezes_base:
        return
    method = inputs.config.method
    if method.fits_swapped_blocks and inputs.config.train.swap_blocks is None and blocks > BUFFERS:
        for count in dict.fromkeys(max(BUFFERS + 1, -(-blocks * quarters // 4)) for quarters in (1, 2, 3, 4)):
            yield _changed(inputs, "train", gradient_checkpointing="block", checkpointed_blocks=None, swap_blocks=count)
    eight_bit = importlib.util.find_spec("bitsandbytes") is not None
    if inputs.config.model.quantize == "none" and eight_bit:
        form = "nf4" if method.fits_base("nf4") else "int8"
        yield from leaner_configurations(_changed(inputs, "model", quantize=form))


def _batch_splits(inputs: ForecastInputs) -> Iterator[ForecastInputs]:
    """Yield the splits of a step's images into micro-batches, the smallest first."""
    train = inputs.config.train
    if train.fused_backward:  # no gradient is accumulated
        yield inputs
        return
    images = train.batch_size * train.gradient_accumulation
    for batch in range(1, images + 1):
        if images % batch == 0:
            yield _changed(inputs, "train", batch_size=batch, gradient_accumulation=images // batch)

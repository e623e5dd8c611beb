"""`train.memory`: how a step is computed so that the run fits into it, at the least cost in time and in precision.

What is trained stays the same: the images of an optimizer step, the model and the objective. Tried in order: what the
configuration says; recomputing a quarter of the blocks, half of them, and so on; all of every block; the same with the
base in 4 bits. Of each, the largest batch that the gradient accumulation can be divided into.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sd3tune.config import Config
from sd3tune.config.sections.model import ModelConfig
from sd3tune.errors import ConfigError
from sd3tune.forecast.forecast import CONTEXT, MARGIN, Forecast, Outlook, forecast
from sd3tune.reporting import progress_bar
from sd3tune.run.buckets import bucket_of
from sd3tune.run.preflight import Plan
from sd3tune.runtime.processes import Processes

KEY = "train.memory"


def room_of(memory: float | str, device: torch.device) -> int:
    """Return the bytes that `train.memory` stands for; `auto` is what is free on the GPU or, on the CPU, all memory.

    What this process holds of the GPU counts as free, up to the allowance for CUDA itself.
    """
    if not isinstance(memory, str):
        return round(memory * 1e9)
    if device.type == "cuda":
        before = torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)  # makes CUDA's context, which the allowance counts as well
        return min(free + before + CONTEXT, total)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fitted_plan(plan: Plan, processes: Processes) -> tuple[Plan, list[str]]:
    """Return the plan of a run that fits into its `train.memory`, if that is given, and what to say of it.

    All processes choose the same: what fits into the GPU that has the least memory free.
    """
    memory = plan.config.train.memory
    if memory is None:
        return plan, []
    largest = max((bucket_of(record, plan.buckets) for record in plan.records), key=lambda size: size[0] * size[1])
    outlook = Outlook(
        config=plan.config,
        base=plan.base,
        dtype=plan.dtype,
        buckets=plan.buckets,
        largest=largest,
        records=plan.records,
        holdout=plan.holdout,
        priors=plan.priors,
        missing=(),
    )
    room = torch.tensor(room_of(memory, plan.device), device=plan.device)
    found = fit(outlook, int(processes.gather(room).min()), quiet=not processes.is_main)
    return replace(plan, config=found.outlook.config), [describe(outlook.config, found)]


def fit(outlook: Outlook, room: int, quiet: bool = False) -> Forecast:
    """The forecast of the first way to compute that needs at most `room` bytes. Raises ConfigError without one."""
    plan = forecast(outlook)
    t5 = plan.encoding.get("t5")
    if t5 is not None and t5.peak * (1 + MARGIN) + CONTEXT > room:
        outlook = _changed(outlook, "model", t5_device="cpu")
        plan = forecast(outlook, plan)
    given_up: ModelConfig | None = None
    bar = progress_bar(list(ways(outlook)), desc="fitting into memory", unit="way", leave=False, delay=2, disable=quiet)
    for leaner in bar:
        if leaner.config.model == given_up:
            continue
        found = None
        for split in _splits(leaner):
            plan = forecast(split, plan)
            if plan.needed > room:
                break
            found = plan
        if _needs_another_base(plan, room):
            given_up = plan.outlook.config.model
        if found is not None:
            return found
    worst = max(plan.phases, key=lambda name: plan.phases[name].peak)
    raise ConfigError(
        f"{KEY}: {room / 1e9:.3g} GB cannot hold this run: the minimum is {plan.needed / 1e9:.3g} GB (to {worst}); "
        "lower data.resolution, or give it more"
    )


def _needs_another_base(plan: Forecast, room: int) -> bool:
    """Whether what checkpointing leaves alone is too much already."""
    other = max(use.peak for name, use in plan.phases.items() if name != "train")
    return max(other, plan.training.resident) * (1 + MARGIN) + CONTEXT > room


def describe(config: Config, found: Forecast) -> str:
    """Return the line that says what was chosen."""
    chosen = changes(config, found) or "the configuration as it is"
    return f"memory    {found.needed / 1e9:.3g} GB will do, with {chosen}"


def changes(config: Config, found: Forecast) -> str:
    """Return the settings in which the forecast's configuration differs from `config`, as they are typed."""
    before, after = config.model_dump(), found.outlook.config.model_dump()
    return " ".join(
        f"{section}.{key}={value}"
        for section, values in after.items()
        if values != before[section]
        for key, value in values.items()
        if value != before[section][key]
    )


def _changed(outlook: Outlook, section: str, **values: Any) -> Outlook:
    changed = getattr(outlook.config, section).model_copy(update=values)
    return replace(outlook, config=outlook.config.model_copy(update={section: changed}))


def ways(outlook: Outlook) -> Iterator[Outlook]:
    """The same training, computed with less and less memory."""
    yield outlook
    blocks = outlook.base.config("transformer")["num_layers"]
    some = dict.fromkeys(-(-blocks * quarters // 4) for quarters in (1, 2, 3))
    steps = [("selective", count) for count in some] + [("selective", None), ("block", None)]
    if outlook.config.train.gradient_checkpointing != "none":
        steps = [("block", None)]
    for kind, count in steps:
        yield _changed(outlook, "train", gradient_checkpointing=kind, checkpointed_blocks=count)
    eight_bit = importlib.util.find_spec("bitsandbytes") is not None
    if outlook.config.method.freezes_base and outlook.config.model.quantize == "none" and eight_bit:
        yield from ways(_changed(outlook, "model", quantize="nf4"))


def _splits(outlook: Outlook) -> Iterator[Outlook]:
    """The images of a step, one at a time, then more at a time."""
    train = outlook.config.train
    images = train.batch_size * train.gradient_accumulation
    for batch in range(1, images + 1):
        if images % batch == 0:
            yield _changed(outlook, "train", batch_size=batch, gradient_accumulation=images // batch)

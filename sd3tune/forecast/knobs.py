"""The configuration changes whose savings `sd3tune plan` lists."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch

from sd3tune.config import Config
from sd3tune.config.meaning import leaner_values
from sd3tune.config.shape import section_at
from sd3tune.config.sharding import sharding_problem
from sd3tune.forecast.forecast import ForecastInputs, forecast_inputs
from sd3tune.methods import METHODS
from sd3tune.model.load.quantized import missing_library
from sd3tune.run.knobs import lower_resolution, more_swapped
from sd3tune.runtime.device import DTYPES

Knob = tuple[str, Callable[[Config], Config]]


def _changed(section: str, **values: object) -> Callable[[Config], Config]:
    return lambda config: config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def knobs(inputs: ForecastInputs) -> list[Knob]:
    """Return possible configuration changes, cheapest first: each as typed, and as a function that applies it."""
    config, dtype, blocks = inputs.config, inputs.dtype, inputs.base.config("transformer")["num_layers"]
    train = config.train
    eight_bit = importlib.util.find_spec("bitsandbytes") is not None
    found: list[Knob] = []
    partly = train.checkpointed_blocks is not None
    for kind in ("none", *leaner_values(config, "train.gradient_checkpointing")):
        if kind != train.gradient_checkpointing:
            typed = f"train.gradient_checkpointing={kind}" + " train.checkpointed_blocks=null" * partly
            found.append((typed, _changed("train", gradient_checkpointing=kind, checkpointed_blocks=None)))
    if train.gradient_checkpointing != "none" and not partly:
        found.append((f"train.checkpointed_blocks={blocks // 2}", _changed("train", checkpointed_blocks=blocks // 2)))
    if (swapped := more_swapped(config, blocks)) is not None:
        found.append((f"train.swap_blocks={swapped}", _changed("train", swap_blocks=swapped)))
    if train.batch_size > 1 and not train.fused_backward:
        more = train.gradient_accumulation * train.batch_size
        typed = f"train.batch_size=1 train.gradient_accumulation={more}"
        found.append((typed, _changed("train", batch_size=1, gradient_accumulation=more)))
    lower = lower_resolution(config)
    if lower is not None:
        found.append((f"data.resolution={lower}".replace(" ", ""), _changed("data", resolution=lower)))
    if config.model.t5:
        if config.model.t5_device == "auto":
            found.append(("model.t5_device=cpu", _changed("model", t5_device="cpu")))
        if config.model.t5_quantize == "none":
            found.append(("model.t5_quantize=int8", _changed("model", t5_quantize="int8")))
        found.append(("model.t5=false", _changed("model", t5=False)))
    for form in filter(config.method.fits_base, leaner_values(config, "model.quantize")):
        if form != config.model.quantize and not missing_library("model.quantize", form):
            found.append((f"model.quantize={form}", _changed("model", quantize=form)))
    if dtype is torch.float32:
        found.append(("model.dtype=bf16", _changed("model", dtype="bf16")))
    for kind in leaner_values(config, "optimizer.kind") if eight_bit else ():
        found.append((f"optimizer.kind={kind}", _with_optimizer(kind)))
    own = METHODS[config.method.kind](config, inputs.base).savings(config)
    found += [(one.typed, _changed(one.section, **one.values)) for one in own if one.planned]
    return [(typed, changed) for typed, changed in found if sharding_problem(changed(config)) is None]


def _with_optimizer(kind: str) -> Callable[[Config], Config]:
    """Return a function that switches the optimizer to another kind and keeps the settings that both have."""

    def changed(config: Config) -> Config:
        settings = {**config.optimizer.model_dump(), "kind": kind}
        section = section_at({"optimizer": settings}, ("optimizer",))
        assert section is not None
        shared = {name: value for name, value in settings.items() if name in section.model_fields}
        return config.model_copy(update={"optimizer": section(**shared)})

    return changed


def after(inputs: ForecastInputs, changed: Callable[[Config], Config]) -> ForecastInputs:
    """Return the inputs of the changed configuration; the data is read again only if the resolution changes."""
    config = changed(inputs.config)
    dtype = DTYPES.get(config.model.dtype, inputs.dtype) if config.model != inputs.config.model else inputs.dtype
    if config.data.resolution == inputs.config.data.resolution:
        return replace(inputs, config=config, dtype=dtype)
    return forecast_inputs(config, dtype, inputs.world, inputs.loaded)

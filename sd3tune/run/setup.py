"""Set-up of the transformer for training, as configured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from sd3tune.config import Config
from sd3tune.data.sampler import generator
from sd3tune.methods import Method
from sd3tune.model.base.parts import is_modulation
from sd3tune.model.compute.checkpointing import checkpoint_blocks
from sd3tune.model.compute.fast import use_fast_path
from sd3tune.model.compute.hoist import hoist
from sd3tune.model.compute.swap import BlockSwap
from sd3tune.model.load.quantized import load_transformer_in
from sd3tune.run.preflight import Plan


def load_base(plan: Plan, device: torch.device | None = None) -> SD3Transformer2DModel:
    """Load the frozen transformer onto its device, quantized and with swapped blocks if configured.

    `device` is another one, for a model without swapped blocks.
    """
    prepare = hoist if hoists(plan.config, plan.modules) else None
    form, count = plan.config.model.quantize, plan.config.train.swap_blocks
    if count is None:
        return load_transformer_in(form, plan.base, plan.dtype, device or plan.device, prepare)
    swap = BlockSwap(plan.base.config("transformer")["num_layers"], count, plan.device)
    transformer = load_transformer_in(form, plan.base, plan.dtype, plan.device, prepare, swap.store)
    swap.install(transformer)
    return transformer


def hoists(config: Config, modules: Sequence[str]) -> bool:
    """Return whether adaLN modulations are computed ahead: if configured, and if nothing that makes them is trained.

    They are made by the adaLN linears from the pooled text.
    """
    return config.train.hoist and not config.method.trains_text and not any(is_modulation(name) for name in modules)


def make_trainable(config: Config, method: Method, transformer: SD3Transformer2DModel) -> dict[str, nn.Parameter]:
    """Add the trainable parameters to the model, and return them by name, fp32.

    Sets up gradient checkpointing and the fast path, if configured. Works on the meta device, too.
    """
    checkpoint_blocks(transformer, config.train.gradient_checkpointing, config.train.checkpointed_blocks)
    parameters = method.inject(transformer, lambda name: generator(config.seed, "init", name))
    if config.train.fast_path and config.train.compile == "none":
        use_fast_path(transformer)
    return parameters

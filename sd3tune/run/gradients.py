"""The gradient pass of `method.rank: auto`: how much the loss asks of each module's weight."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.flow.objective import velocity_loss, velocity_target
from sd3tune.run.batches import make_batches
from sd3tune.run.encoding import Encoded
from sd3tune.run.preflight import Plan
from sd3tune.runtime.processes import ALONE, Processes
from sd3tune.training.step import predict_velocity

STEPS = 8
"""Number of steps whose first image is seen."""
_FP16_SCALE = 1024.0


def gradient_norms(
    plan: Plan, encoded: Encoded, transformer: SD3Transformer2DModel, processes: Processes, modules: Sequence[str]
) -> dict[str, float]:
    """Return module -> sum over a few images of the norm of the loss's gradient by its weight; only ratios matter.

    Every process sees the same images. No gradient of a whole weight is kept.
    """
    transformer.requires_grad_(False)
    norms = torch.zeros(len(modules), device=transformer.device)
    batches = make_batches(plan, encoded, ALONE)
    with ExitStack() as stack:
        stack.callback(batches.close)
        for place, name in enumerate(modules):
            hook = transformer.get_submodule(name).register_forward_hook(partial(_watch, norms, place))
            stack.callback(hook.remove)
        for step in range(STEPS):
            batch = batches.fetch(step, 0).rows(slice(1))
            velocity = predict_velocity(transformer, plan.method, batch).float()
            target = velocity_target(batch.latents, batch.noise)
            loss = velocity_loss(velocity, target, batch.position_weights).mean()
            (loss * (_FP16_SCALE if plan.dtype is torch.float16 else 1.0)).backward()
    found = processes.reduce_mean(norms)  # the mean gives all ranks bit-identical values
    return dict(zip(modules, found.tolist(), strict=True))


def _watch(norms: Tensor, place: int, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Add the norm of the gradient by the layer's weight, once the backward pass reaches its output."""
    rows = inputs[0].detach().flatten(0, -2)
    if not output.requires_grad:  # the first watched layer; all weights are frozen
        output.requires_grad_(True)

    def add(gradient: Tensor) -> None:
        norms[place] += (gradient.flatten(0, -2).T.float() @ rows.float()).norm().nan_to_num(0.0, 0.0, 0.0)

    output.register_hook(add)

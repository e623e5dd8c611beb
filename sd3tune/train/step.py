"""One training step, start to end. Read it beside Esser et al. 2024, "Scaling Rectified Flow Transformers".

z_t = (1 - sigma) z_0 + sigma noise            the noisy latents
v   = transformer(z_t, 1000 sigma, caption)    the predicted velocity
L   = w(sigma) |v - (noise - z_0)|^2           per sample, in fp32 (or Huber's loss)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from sd3tune.config.schema import Config
from sd3tune.flow.objective import interpolate, model_timestep, velocity_target
from sd3tune.methods import Method
from sd3tune.train.batches import Batch, Batches
from sd3tune.train.objective import Objective
from sd3tune.train.optim import FlatMaster, LossScale, clip_, ema_decay, learning_rate


@dataclass
class TrainState:
    """All that changes while training, and all that a checkpoint holds."""

    step: int
    """Optimizer steps done."""
    master: FlatMaster
    optimizer: torch.optim.Optimizer
    ema: Tensor | None
    loss_scale: LossScale


@dataclass(frozen=True)
class StepResult:
    """Device tensors; nothing was copied to the host."""

    losses: Tensor
    """Unweighted velocity loss of each of this rank's samples [accumulation * batch]."""
    weighted: Tensor
    """The same times w(sigma) and the source's weight: what was minimised."""
    sigmas: Tensor
    grad_norm: Tensor
    """Before clipping; not finite when the step was skipped."""
    learning_rate: float


def predict_velocity(transformer: SD3Transformer2DModel, method: Method, batch: Batch) -> Tensor:
    """The model's velocity [B, C, H, W] for the batch's noisy latents, in the transformer's dtype."""
    prompt_embeds, pooled_prompt_embeds = method.conditioning(batch.embeddings, transformer)
    noisy_latents = interpolate(batch.latents, batch.noise, batch.sigma)
    velocity: Tensor = transformer(
        hidden_states=noisy_latents.to(prompt_embeds.dtype),
        timestep=model_timestep(batch.sigma),
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        return_dict=False,
    )[0]
    return velocity


def velocity_losses(velocity: Tensor, batch: Batch, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The loss of each sample of the batch, [B] fp32, unweighted."""
    return loss(velocity, velocity_target(batch.latents, batch.noise))


def train_step(
    state: TrainState,
    transformer: SD3Transformer2DModel,
    method: Method,
    batches: Batches,
    objective: Objective,
    config: Config,
    reduce_mean: Callable[[Tensor], Tensor],
) -> StepResult:
    """Gradients of all micro-steps, then one update. `reduce_mean` averages a tensor over the processes."""
    accumulation = config.train.gradient_accumulation
    samples = []
    for micro in range(accumulation):
        batch = batches.fetch(state.step, micro)
        with method.regularised(transformer, batches.seed_for("dropout", state.step, micro)):
            losses = velocity_losses(predict_velocity(transformer, method, batch), batch, objective.loss)
            weighted = objective.weight(batch.sigma) * batch.weights * losses
            (weighted.mean() / accumulation * state.loss_scale.scale).backward()
        state.master.collect_gradients()
        samples.append(torch.stack([losses.detach(), weighted.detach(), batch.sigma]))

    lr = learning_rate(config.schedule, config.optimizer.lr, state.step, config.train.total_steps)
    grad_norm = update(state, config, lr, reduce_mean)
    losses, weighted, sigmas = torch.cat(samples, dim=1)
    return StepResult(losses, weighted, sigmas, grad_norm, lr)


def update(state: TrainState, config: Config, lr: float, reduce_mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Clip and apply the summed gradient; skipped on the device when it is not finite. Returns the norm."""
    master, optimizer = state.master, state.optimizer
    gradient = reduce_mean(master.gradient).div_(state.loss_scale.scale)
    grad_norm = clip_(gradient, config.train.max_grad_norm)
    overflow = ~grad_norm.isfinite()

    optimizer.param_groups[0]["lr"] = lr
    optimizer.found_inf = overflow.float()  # type: ignore[attr-defined]  # the fused kernel skips the step by itself
    master.master.grad = gradient
    optimizer.step()
    master.master.grad = None
    master.gradient.zero_()
    master.publish()

    state.loss_scale.update(overflow)
    state.step += 1
    if config.ema is not None and state.ema is not None:
        state.ema.lerp_(master.master.detach(), 1 - ema_decay(config.ema, state.step))
    return grad_norm

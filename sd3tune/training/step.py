"""One training step, start to end. Read it beside Esser et al. 2024, "Scaling Rectified Flow Transformers".

z_t = (1 - sigma) z_0 + sigma noise            the noisy latents
v   = transformer(z_t, 1000 sigma, caption)    the predicted velocity
L   = w(sigma) |v - (noise - z_0)|^2           per sample, in fp32 (or Huber's loss)

The loss is mean(L of instances) + weight * mean(L of prior samples), if there are prior samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.config.schema import Config
from sd3tune.flow.objective import interpolate, model_timestep, velocity_target
from sd3tune.methods import Method
from sd3tune.model.compute.hoist import modulate
from sd3tune.training.batches import Batch, Batches
from sd3tune.training.objective import Objective
from sd3tune.training.optim import FlatMaster, LossScale, clip_, ema_decay, learning_rate


@dataclass
class TrainState:
    """Everything that changes during training, which is what a checkpoint holds."""

    step: int
    """Optimizer steps done."""
    master: FlatMaster
    optimizer: torch.optim.Optimizer
    ema: Tensor | None
    loss_scale: LossScale
    updating: bool = False
    """Whether an update has begun and not ended, so that the tensors are of no one step."""


@dataclass(frozen=True)
class StepResult:
    """Device tensors; nothing was copied to the host."""

    losses: Tensor
    """Unweighted velocity loss of each of this rank's instances [accumulation * batch]."""
    weighted: Tensor
    """The same times w(sigma) and the source's weight: the minimised loss."""
    sigmas: Tensor
    prior: Tensor
    """Loss, weighted loss and sigma of the prior samples [3, accumulation * batch]; NaN where there is none."""
    grad_norm: Tensor
    """Before clipping; not finite when the step was skipped."""
    learning_rate: float


def predict_velocity(transformer: SD3Transformer2DModel, method: Method, batch: Batch) -> Tensor:
    """The model's velocity [B, C, H, W] for the batch's noisy latents, in the transformer's dtype."""
    prompt_embeds, pooled_prompt_embeds = method.conditioning(batch.embeddings, transformer)
    noisy_latents = interpolate(batch.latents, batch.noise, batch.sigma)
    modulate(transformer, batch.modulation)
    velocity: Tensor = transformer(
        hidden_states=noisy_latents.to(prompt_embeds.dtype),
        timestep=model_timestep(batch.sigma),
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        return_dict=False,
    )[0]
    return velocity


def velocity_targets(transformer: SD3Transformer2DModel, method: Method, batch: Batch) -> Tensor:
    """Return the targets, [B, C, H, W] fp32: the true velocity or, for kept samples, the base's own prediction."""
    targets = velocity_target(batch.latents, batch.noise)
    if batch.kept.start < batch.kept.stop:
        with torch.no_grad(), method.disabled(transformer):
            targets[batch.kept] = predict_velocity(transformer, method, batch.rows(batch.kept)).float()
    return targets


def train_step(
    state: TrainState,
    transformer: SD3Transformer2DModel,
    method: Method,
    batches: Batches,
    objective: Objective,
    config: Config,
    reduce_mean: Callable[[Tensor], Tensor],
) -> StepResult:
    """Accumulate the gradients of all micro-steps, then update once. `reduce_mean` averages over the processes."""
    accumulation = config.train.gradient_accumulation
    samples = []
    for micro in range(accumulation):
        batch = batches.fetch(state.step, micro)
        with method.regularised(transformer, batches.seed_for("dropout", state.step, micro)):
            targets = velocity_targets(transformer, method, batch)
            losses = objective.loss(predict_velocity(transformer, method, batch), targets)
            weighted = objective.weight(batch.sigma) * batch.weights * losses
            loss = weighted.sum() / batch.instances
            extra = method.extra_loss(transformer, batch)
            if extra is not None:
                loss = loss + extra
            (loss / accumulation * state.loss_scale.scale).backward()
        state.master.collect_gradients()
        samples.append((torch.stack([losses.detach(), weighted.detach(), batch.sigma]), batch.instances))

    lr = learning_rate(config.schedule, config.optimizer.lr, state.step, config.train.total_steps)
    grad_norm = update(state, config, lr, reduce_mean)
    losses, weighted, sigmas = torch.cat([of[:, :instances] for of, instances in samples], dim=1)
    prior = [_padded(of[:, instances:], instances if batches.with_prior else 0) for of, instances in samples]
    return StepResult(losses, weighted, sigmas, torch.cat(prior, dim=1), grad_norm, lr)


def _padded(values: Tensor, columns: int) -> Tensor:
    """Append columns of NaN, so that the results of all steps and ranks have one shape."""
    return nn.functional.pad(values, (0, columns - values.shape[1]), value=math.nan)


def update(state: TrainState, config: Config, lr: float, reduce_mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Clip and apply the summed gradient, or skip it on the device if it is not finite. Return its unclipped norm."""
    master, optimizer = state.master, state.optimizer
    gradient = reduce_mean(master.gradient).div_(state.loss_scale.scale)
    grad_norm = clip_(gradient, config.train.max_grad_norm)
    overflow = ~grad_norm.isfinite()

    state.updating = True
    optimizer.param_groups[0]["lr"] = lr
    optimizer.found_inf = overflow.float()  # type: ignore[attr-defined]  # where it is not 0, a step changes nothing
    master.master.grad = gradient
    optimizer.step()
    master.master.grad = None
    master.gradient.zero_()
    master.publish()

    state.loss_scale.update(overflow)
    state.step += 1
    if config.ema is not None and state.ema is not None:
        state.ema.lerp_(master.master.detach(), 1 - ema_decay(config.ema, state.step))
    state.updating = False
    return grad_norm

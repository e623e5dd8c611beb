"""One training step, from batches to updated weights.

The formulas are from Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis":

    z_t = (1 - sigma) z_0 + sigma noise            noisy latents
    v   = transformer(z_t, 1000 sigma, caption)    predicted velocity
    L   = w(sigma) |v - (noise - z_0)|^2           loss of one sample, in fp32 (or another distance)

With a mask, the loss of a sample is the weighted mean over its latent positions.

The minimised loss is mean(L of the instances), plus weight * mean(L of the prior samples) if there are any.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.config.schema import Config
from sd3tune.config.sections.masks import any_keeps_base
from sd3tune.flow.objective import interpolate, model_timestep, velocity_target
from sd3tune.methods import Method
from sd3tune.model.compute.hoist import modulate
from sd3tune.training.batches import Batch, BatchSource
from sd3tune.training.drift import DriftLimit
from sd3tune.training.flat_master import FlatMaster, LossScale, clip_, ema_decay
from sd3tune.training.fused_backward import FusedBackward
from sd3tune.training.objective import Objective
from sd3tune.training.optimizers import result_of
from sd3tune.training.schedules import learning_rate


@dataclass
class TrainState:
    """The state that changes during training: the contents of a checkpoint."""

    step: int
    """Number of completed optimizer steps."""
    master: FlatMaster
    """The trainable parameters in fp32, and their accumulated gradient."""
    optimizer: torch.optim.Optimizer
    ema: Tensor | None
    """Moving average of the master, in its shape; None without `ema`."""
    loss_scale: LossScale
    fused: FusedBackward | None = None
    """With `train.fused_backward`: applies the gradients inside the backward pass."""
    drift: DriftLimit | None = None
    """With a prior's `drift_limit`: steers the weight of the preserved predictions."""
    updating: bool = False
    """True while an update runs: the tensors then belong to two steps, and must not be saved."""

    def result(self) -> Tensor:
        """Return the trained weights without the EMA: the master or, for some optimizers, their own average."""
        return result_of(self.optimizer, self.master.master)


@dataclass(frozen=True)
class StepResult:
    """The measurements of one step on this rank, left on the device."""

    losses: Tensor
    """Unweighted velocity losses of the instances, [accumulation * batch] fp32."""
    weighted: Tensor
    """The minimised losses, `losses` * w(sigma) * the source's weight: [accumulation * batch] fp32."""
    sigmas: Tensor
    """The instances' sigmas, [accumulation * batch] fp32."""
    prior: Tensor
    """Loss, weighted loss and sigma of the prior samples, [3, accumulation * batch]; NaN for a missing sample.

    [3, 0] if no source has a prior.
    """
    grad_norm: Tensor
    """Norm of the whole gradient before clipping, a scalar; not finite if the update was skipped."""
    learning_rate: float
    drift: Tensor | None = None
    """With a limit on drift: the drift, and the factor on the prior's weight in this step, [2]."""


@dataclass(frozen=True)
class BaseTargets:
    """The passes of the untrained base that each micro-step makes, even if no row of this rank's batch needs them.

    Every process takes part in each pass of a sharded model.
    """

    kept: bool = False
    from_base: bool = False

    @classmethod
    def of(cls, config: Config) -> BaseTargets:
        if config.train.sharding == "none":
            return cls()
        return cls(bool(config.data.own_predictions), any_keeps_base(config.data.sources))


def predict_velocity(transformer: SD3Transformer2DModel, method: Method, batch: Batch) -> Tensor:
    """Return the predicted velocity of the batch's noisy latents, [B, C, H, W] in the transformer's dtype."""
    prompt_embeds, pooled_prompt_embeds = method.conditioning(batch.embeddings, transformer)
    noise = batch.noise if batch.input_noise is None else batch.input_noise
    noisy_latents = interpolate(batch.latents, noise, batch.sigma)
    modulate(transformer, batch.modulation)
    velocity: Tensor = transformer(
        hidden_states=noisy_latents.to(prompt_embeds.dtype),
        timestep=model_timestep(batch.sigma),
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        return_dict=False,
    )[0]
    return velocity


def velocity_targets(
    transformer: SD3Transformer2DModel, method: Method, batch: Batch, always: BaseTargets = BaseTargets()
) -> Tensor:
    """Return the targets, [B, C, H, W] fp32: the true velocity or, for `batch.kept`, the base model's prediction.

    `batch.from_base` mixes the two at each latent position. The base also predicts what no row needs if `always` says
    so.
    """

    def base_velocity(rows: slice) -> Tensor:
        with torch.no_grad(), method.disabled(transformer):
            return predict_velocity(transformer, method, batch.rows(rows)).float()

    targets = velocity_target(batch.latents, batch.noise)
    if batch.kept.start < batch.kept.stop:
        targets[batch.kept] = base_velocity(batch.kept)
    elif always.kept:
        base_velocity(slice(1))
    rows = slice(batch.instances)
    if batch.from_base is not None:
        targets[rows] = targets[rows].lerp(base_velocity(rows), batch.from_base[rows, None])
    elif always.from_base:
        base_velocity(slice(1))
    return targets


def train_step(
    state: TrainState,
    transformer: SD3Transformer2DModel,
    method: Method,
    batches: BatchSource,
    objective: Objective,
    config: Config,
    reduce_mean: Callable[[Tensor], Tensor],
) -> StepResult:
    """Accumulate the gradients of all micro-steps, then update the weights once.

    `reduce_mean` averages a tensor over the processes, in place.
    """
    accumulation = config.train.gradient_accumulation
    lr = learning_rate(config.schedule, config.optimizer.lr, state.step, config.train.total_steps)
    done = state.step / config.train.total_steps
    base_targets = BaseTargets.of(config)
    state.master.freeze(method.frozen(done))
    if state.fused is not None:
        state.updating = True
        state.fused.begin(lr, reduce_mean)
    measured = []  # per micro-step: loss, weighted loss and sigma [3, B], and the number of instances, which come first
    for micro in range(accumulation):
        batch = batches.fetch(state.step, micro)
        with method.regularised(transformer, batches.seed_for("dropout", state.step, micro)):
            targets = velocity_targets(transformer, method, batch, base_targets)
            prediction = predict_velocity(transformer, method, batch)
            losses = objective.losses(prediction, targets, batch.sigma, done, batch.position_weights)
            weighted = objective.weight_at(batch.size)(batch.sigma) * batch.weights * losses
            if state.drift is not None:
                state.drift.measure(prediction, targets, batch.kept)
                weighted = state.drift.weighted(weighted, batch.kept)
            loss = weighted.sum() / batch.instances
            extra = method.extra_loss(transformer, batch)
            if extra is not None:
                loss = loss + extra
            (loss / accumulation * state.loss_scale.scale).backward()
        if state.fused is None:
            state.master.collect_gradients()
        measured.append((torch.stack([losses.detach(), weighted.detach(), batch.sigma]), batch.instances))

    drift = None if state.drift is None else state.drift.update(reduce_mean)
    grad_norm = update(state, config, lr, reduce_mean)
    losses, weighted, sigmas = torch.cat([columns[:, :count] for columns, count in measured], dim=1)
    prior = [_padded(columns[:, count:], count if batches.with_prior else 0) for columns, count in measured]
    return StepResult(losses, weighted, sigmas, torch.cat(prior, dim=1), grad_norm, lr, drift)


def update(state: TrainState, config: Config, lr: float, reduce_mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Clip and apply the accumulated gradient. Return its norm before clipping, a scalar.

    A gradient that is not finite is skipped, without waiting for the device. With `state.fused` it is applied already.
    """
    if state.fused is None:
        grad_norm = _apply_gradient(state, config, lr, reduce_mean)
    else:
        grad_norm = state.fused.finish()
    state.step += 1
    if config.ema is not None and state.ema is not None:
        state.ema.lerp_(state.result(), 1 - ema_decay(config.ema, state.step))
    state.updating = False
    return grad_norm


def _apply_gradient(state: TrainState, config: Config, lr: float, reduce_mean: Callable[[Tensor], Tensor]) -> Tensor:
    master, optimizer = state.master, state.optimizer
    gradient = master.averaged(reduce_mean).div_(state.loss_scale.scale)
    norms = [clip_(gradient[part], config.train.max_grad_norm, master.norm) for part in master.clipped_parts]
    grad_norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    overflow = ~grad_norm.isfinite()

    state.updating = True
    optimizer.param_groups[0]["lr"] = lr
    optimizer.found_inf = overflow.float()  # type: ignore[attr-defined]  # the optimizer skips its step unless 0
    master.master.grad = gradient
    with master.at_own_rates():
        optimizer.step()
    master.master.grad = None
    master.gradient.zero_()
    master.publish()
    state.loss_scale.update(overflow)
    return grad_norm


def _padded(values: Tensor, columns: int) -> Tensor:
    """Pad `values` with NaN to `columns` columns, so that the results of all steps and ranks have one shape."""
    return nn.functional.pad(values, (0, columns - values.shape[1]), value=math.nan)

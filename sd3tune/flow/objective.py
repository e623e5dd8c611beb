"""The objective: interpolate between data and noise, predict the velocity (Esser et al. 2024, sections 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TRAIN_TIMESTEPS = 1000
"""The model's timestep input is this factor times sigma, not rounded."""


def per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    """Reshape `sigma` [B] to broadcast against `like` [B, ...]."""
    return sigma.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return z_t = (1 - sigma) z_0 + sigma noise, for `latents` and `noise` [B, C, H, W] and `sigma` [B]."""
    sigma = per_sample(sigma, latents)
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity d z_t / d sigma = noise - z_0, the target of the model's prediction."""
    return noise - latents


def velocity_loss(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean squared error per sample: [B, C, H, W] -> [B] fp32 (float64 for float64 inputs).

    With `weights` [B, H, W] it is weighted at latent positions.
    """
    square = (prediction.to(target.dtype) - target).square()
    return (square if weights is None else weights[:, None] * square).flatten(1).mean(1)


def position_weights(mask: Tensor, outside: float) -> Tensor:
    """Return the weights of latent positions, with mean 1 over the last two dimensions: [..., H, W] fp32.

    They are proportional to 1 inside the mask, where it is 1, and to `outside` where it is 0. All are 0 if their mean
    is.
    """
    weights = outside + (1 - outside) * mask
    return weights / weights.mean((-2, -1), keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def masked_loss(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    prediction: Tensor,
    target: Tensor,
    sigma: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """Return the loss of each sample, [B]; with `weights` [B, H, W], the mean of weight * loss over latent positions.

    `loss` maps predictions and targets [B, C, H, W] and `sigma` [B] to [B]. With weights it gets each position as a
    sample of its own, [B * H * W, C, 1, 1], so any mean over values can be weighted.
    """
    if weights is None:
        return loss(prediction, target, sigma)
    one, other = (values.movedim(1, -1).reshape(-1, values.shape[1], 1, 1) for values in (prediction, target))
    losses = loss(one, other, sigma.repeat_interleave(weights[0].numel()))
    return (weights * losses.reshape(weights.shape)).flatten(1).mean(1)


def huber_loss(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    """Return Huber's loss per sample in fp32 (Huber 1964): d^2 / 2 where |d| < delta, else delta (|d| - delta / 2)."""
    return F.huber_loss(prediction.to(target.dtype), target, reduction="none", delta=delta).flatten(1).mean(1)


def absolute_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute error per sample in fp32; its optimum is the median of the target, value by value."""
    return (prediction.to(target.dtype) - target).abs().flatten(1).mean(1)


def pseudo_huber_loss(prediction: Tensor, target: Tensor, delta: Tensor) -> Tensor:
    """Return the mean of delta^2 (sqrt(1 + (d / delta)^2) - 1) per sample in fp32 (Charbonnier et al. 1997).

    It is d^2 / 2 for |d| far below delta, and delta |d| far above. `delta` has shape [B], or [1] for one value.
    """
    square = (prediction.to(target.dtype) - target).square()
    delta = per_sample(delta.to(target), square)
    # The same value without cancellation: sqrt(1 + x) - 1 = x / (sqrt(1 + x) + 1).
    return (square / ((1 + square / delta.square()).sqrt() + 1)).flatten(1).mean(1)


def between(first: float, last: float, progress: Tensor) -> Tensor:
    """Return first^(1 - progress) last^progress: equal factors for equal parts of the way from `first` to `last`."""
    return first * (last / first) ** progress


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Return `noise` [..., C, H, W] plus `strength` times `offset` [..., C], a constant per channel."""
    return noise + strength * offset[..., None, None]


def perturbed_noise(noise: Tensor, perturbation: Tensor, strength: float) -> Tensor:
    """Return `noise` plus `strength` times `perturbation`, standard normal in its shape (Ning et al. 2023).

    The noisy latents are made of it; the target is still that of `noise`.
    """
    return noise + strength * perturbation


def model_timestep(sigma: Tensor) -> Tensor:
    """Return the transformer's timestep input for `sigma` [B]."""
    return TRAIN_TIMESTEPS * sigma

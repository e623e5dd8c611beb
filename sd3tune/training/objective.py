"""The objective of a configuration: tables of densities of sigma, weightings and losses, by kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sd3tune.config.sections.flow import (
    FlowConfig,
    LossSection,
    MixtureConfig,
    PseudoHuberConfig,
    TimestepsSection,
    WeightingSection,
)
from sd3tune.config.variants import LOSS, TIMESTEPS, WEIGHTING, Registry
from sd3tune.data.buckets import Size
from sd3tune.flow import objective, timesteps, weighting

OfSigma = Callable[[Any, Tensor], Tensor]
"""(settings of the kind, float64 values of any shape) -> values of the same shape."""
Distance = Callable[[Any, Tensor, Tensor, Tensor, float], Tensor]
"""(settings of the kind, predicted velocity [B, C, H, W], target in fp32, sigma [B], share of the steps done) ->
loss of each sample, [B] fp32."""


@functools.lru_cache(maxsize=8)
def _mixture(written: str) -> Callable[[Tensor], Tensor]:
    """Return the inverse CDF of a mixture, given by its settings in JSON."""
    settings = MixtureConfig.model_validate_json(written)
    parts = [functools.partial(DENSITIES[part.kind], part) for part in settings.parts]
    return timesteps.mixture(parts, settings.shares or [1.0] * len(parts))


DENSITIES: Registry[OfSigma] = Registry(
    TIMESTEPS,
    {
        "logit_normal": lambda settings, u: timesteps.logit_normal(u, settings.mean, settings.std),
        "uniform": lambda settings, u: timesteps.uniform(u),
        "mode": lambda settings, u: timesteps.mode(u, settings.scale),
        "cosmap": lambda settings, u: timesteps.cosmap(u),
        "beta": lambda settings, u: timesteps.beta(u, settings.alpha, settings.beta),
        "mixture": lambda settings, u: _mixture(settings.model_dump_json())(u),
    },
)
WEIGHTS: Registry[OfSigma] = Registry(
    WEIGHTING,
    {
        "none": lambda settings, sigma: weighting.none(sigma),
        "min_snr": lambda settings, sigma: weighting.min_snr(sigma, settings.gamma),
        "sigma_sqrt": lambda settings, sigma: weighting.sigma_sqrt(sigma),
        "cosmap": lambda settings, sigma: weighting.cosmap(sigma),
    },
)
LOSSES: Registry[Distance] = Registry(
    LOSS,
    {
        "mse": lambda settings, prediction, target, sigma, done: objective.velocity_loss(prediction, target),
        "absolute": lambda settings, prediction, target, sigma, done: objective.absolute_loss(prediction, target),
        "huber": lambda settings, prediction, target, sigma, done: objective.huber_loss(
            prediction, target, settings.delta
        ),
        "pseudo_huber": lambda settings, prediction, target, sigma, done: objective.pseudo_huber_loss(
            prediction, target, _delta(settings, sigma, done)
        ),
    },
)
BASE_PIXELS = 1024**2
"""The image size, in pixels, that the base scheduler's shift is meant for."""


def register_timesteps(section: type[TimestepsSection], sigma_of_u: OfSigma) -> None:
    """Add a density of sigma, given by its inverse CDF: u in (0, 1) -> sigma in [0, 1], rising, before the shift.

    Raises ValueError for a kind that is already registered.
    """
    DENSITIES.register(section, sigma_of_u)


def register_weighting(section: type[WeightingSection], weight: OfSigma) -> None:
    """Add a weight of the loss: shifted sigma -> factor, divided by its mean unless `section.normalised` is off.

    Raises ValueError for a kind that is already registered.
    """
    WEIGHTS.register(section, weight)


def register_loss(section: type[LossSection], distance: Distance) -> None:
    """Add a distance between the predicted and the target velocity: see `Distance`.

    Raises ValueError for a kind that is already registered.
    """
    LOSSES.register(section, distance)


@dataclass(frozen=True)
class Objective:
    """The objective: the mean over samples of `weight(sigma) * loss(prediction, target, ...)` is minimised."""

    loss: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """(predicted velocity, target, both [B, C, H, W], sigma [B], share of the steps done) -> [B] fp32."""
    weight: Callable[[Tensor], Tensor]
    """sigma [B] -> [B]."""
    weights: Mapping[Size, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """(height, width) in pixels -> the weight for images of that size, where it is not `weight`."""

    def weight_at(self, size: Size) -> Callable[[Tensor], Tensor]:
        """Return the weight for images of `size`, (height, width) in pixels."""
        return self.weights.get(size, self.weight)

    def losses(self, prediction: Tensor, target: Tensor, sigma: Tensor, done: float, weights: Tensor | None) -> Tensor:
        """Return the loss of each sample, [B] fp32, with the `weights` of latent positions [B, H, W], if any."""
        return objective.masked_loss(
            lambda one, other, sigma: self.loss(one, other, sigma, done), prediction, target, sigma, weights
        )


def make_objective(flow: FlowConfig, shift: float, shifts: Mapping[Size, float] = {}) -> Objective:
    """Return the configured loss and weight under the shift of the images' size (see `shift_at`).

    `shifts` maps a bucket to its shift; others have `shift`.
    """
    settings, weights = flow.loss, {of: make_weight(flow, of) for of in {shift, *shifts.values()}}
    return Objective(
        loss=functools.partial(LOSSES[settings.kind], settings),
        weight=weights[shift],
        weights={size: weights[of] for size, of in shifts.items() if of != shift},
    )


def _delta(settings: PseudoHuberConfig, sigma: Tensor, done: float) -> Tensor:
    """Return the delta of each sample, [B], or [1] for one value."""
    if settings.last_delta is None:
        return sigma.new_tensor([settings.delta])
    progress = sigma if settings.over == "sigma" else sigma.new_tensor([done])
    return objective.between(settings.delta, settings.last_delta, progress)


def shift_at(flow: FlowConfig, model_shift: float, pixels: int) -> float:
    """Return the shift for images of `pixels` pixels; `model_shift` is the base scheduler's."""
    if flow.shift == "resolution":
        return model_shift * timesteps.resolution_shift(pixels, BASE_PIXELS)
    return model_shift if flow.shift == "model" else flow.shift


def sigma_of_u(flow: FlowConfig, shift: float) -> Callable[[Tensor], Tensor]:
    """Return the inverse CDF of the sigmas in training: the configured density, shifted and truncated to its bounds."""
    return timesteps.truncated(_unbounded(flow, shift), flow.min_sigma, flow.max_sigma)


def sigma_map(flow: FlowConfig, model_shift: float) -> Callable[[Tensor, int], Tensor]:
    """Return the map (u, pixels of the image) -> sigma, with the shift of that image size (see `shift_at`)."""
    inverse_cdf = functools.lru_cache(lambda shift: sigma_of_u(flow, shift))
    return lambda u, pixels: inverse_cdf(shift_at(flow, model_shift, pixels))(u)


def share_inside(flow: FlowConfig, shift: float) -> float:
    """Return the share of the configured density, shifted, that lies within its bounds."""
    low, high = (timesteps.share_below(_unbounded(flow, shift), bound) for bound in (flow.min_sigma, flow.max_sigma))
    return high - low


def _unbounded(flow: FlowConfig, shift: float) -> Callable[[Tensor], Tensor]:
    settings = flow.timesteps
    return lambda u: timesteps.shift_sigma(DENSITIES[settings.kind](settings, u), shift)


def make_weight(flow: FlowConfig, shift: float) -> Callable[[Tensor], Tensor]:
    """Return w(sigma), normalised to mean 1 over the sigmas under `shift` unless that is turned off."""
    settings = flow.weighting
    weight = WEIGHTS[settings.kind]
    if not settings.normalised:
        return lambda sigma: weight(settings, sigma)
    mean = weighting.mean_over_sigma(lambda sigma: weight(settings, sigma), sigma_of_u(flow, shift))
    return lambda sigma: weight(settings, sigma) / mean

"""From the configuration to the objective's functions: one entry a variant, beside each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sd3tune.config.schema import FlowConfig
from sd3tune.flow import timesteps, weighting

SIGMAS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "logit_normal": lambda settings, u: timesteps.logit_normal(u, settings.mean, settings.std),
    "uniform": lambda settings, u: timesteps.uniform(u),
}
WEIGHTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "none": lambda settings, sigma: weighting.none(sigma),
    "min_snr": lambda settings, sigma: weighting.min_snr(sigma, settings.gamma),
}


def sigma_of_u(flow: FlowConfig, shift: float) -> Callable[[Tensor], Tensor]:
    """The inverse CDF of the sigmas in training: the configured density, shifted."""
    settings = flow.timesteps
    return lambda u: timesteps.shift_sigma(SIGMAS[settings.kind](settings, u), shift)


def make_weight(flow: FlowConfig, shift: float) -> Callable[[Tensor], Tensor]:
    """w(sigma), normalised to mean 1 under the sigmas in training."""
    settings = flow.weighting
    weight = WEIGHTS[settings.kind]
    mean = weighting.mean_over_sigma(lambda sigma: weight(settings, sigma), sigma_of_u(flow, shift))
    return lambda sigma: weight(settings, sigma) / mean

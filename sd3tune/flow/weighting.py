"""Weights of the velocity loss as functions of sigma.

For rectified flow SNR = ((1 - sigma) / sigma)^2, and the loss on x_0 is sigma^2 times the loss on the velocity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

QUADRATURE_POINTS = 1 << 18


def none(sigma: Tensor) -> Tensor:
    """Return weight 1 for every sigma."""
    return torch.ones_like(sigma)


def min_snr(sigma: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023) in velocity units: sigma^2 min(SNR, gamma) = min((1-sigma)^2, gamma sigma^2)."""
    return torch.minimum((1 - sigma).square(), gamma * sigma.square())


def sigma_sqrt(sigma: Tensor, smallest: float = 1e-3) -> Tensor:
    """Return sigma^-2, with sigma clamped (the name is from diffusers' SD3 example scripts).

    Its mean is infinite if the density reaches sigma 0, as the uniform density does. For a logit-normal density with,
    after the shift, mean m and deviation s it is 1 + 2 exp(-m + s^2 / 2) + exp(-2 m + 2 s^2).
    """
    return sigma.clamp(min=smallest).pow(-2)


def cosmap(sigma: Tensor) -> Tensor:
    """2 / (pi (1 - 2 sigma + 2 sigma^2)) (Esser et al. 2024, section 3.1): the density of `timesteps.cosmap`."""
    return 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma.square()))


def mean_over_sigma(weight: Callable[[Tensor], Tensor], sigma_of_u: Callable[[Tensor], Tensor]) -> float:
    """Return E[weight(sigma)] under the density whose inverse CDF is `sigma_of_u`, by the midpoint rule in float64.

    Dividing by it makes the mean weight 1, so that losses and gradient clipping stay comparable between weightings.
    """
    u = (torch.arange(QUADRATURE_POINTS, dtype=torch.float64) + 0.5) / QUADRATURE_POINTS
    return weight(sigma_of_u(u)).mean().item()

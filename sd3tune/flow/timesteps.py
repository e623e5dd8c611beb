"""Timestep densities, each written as its inverse CDF, a function of u ~ Uniform(0, 1).

A sample then needs one uniform number, and the shift is applied to the result. Bounds on sigma are bounds on u. The
mean of any function of sigma is an integral over u (see `weighting.mean_over_sigma`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """sigma = sigmoid(mean + std * n), n standard normal (Esser et al. 2024, eq. 19).

    `u` has any shape, with values in (0, 1); float64 is advised. A higher `mean` means more noise.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def uniform(u: Tensor) -> Tensor:
    """sigma = u, as in the original rectified flow (Liu et al. 2022)."""
    return u


def mode(u: Tensor, scale: float) -> Tensor:
    """sigma = u + scale (u - sin^2(pi u / 2)), which favours the middle for scale > 0 and the ends for scale < 0.

    Esser et al. 2024, eq. 20, is `1 - u - scale (cos^2(pi u / 2) - 1 + u)`, which falls from 1 to 0. Here u is
    replaced by 1 - u, so that sigma rises. It is monotone for -1 <= scale <= 2 / (pi - 2).
    """
    return u + scale * (u - torch.sin(torch.pi / 2 * u).square())


def cosmap(u: Tensor) -> Tensor:
    """sigma = 1 - 1 / (tan(pi u / 2) + 1), the log-SNR of the cosine schedule (Esser et al. 2024, eq. 21).

    Written as sin / (sin + cos), which has no pole at u = 1. Its density is 2 / (pi (1 - 2 sigma + 2 sigma^2)).
    """
    angle = torch.pi / 2 * u
    return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """`shift * s / (1 + (shift - 1) * s)` (Esser et al. 2024, eq. 23); 1 changes nothing, more means more noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_shift(pixels: int, base_pixels: int) -> float:
    """sqrt(m / n) for images of m `pixels`, when n `base_pixels` need no shift (Esser et al. 2024, eq. 23).

    It makes the uncertainty about the image at a given sigma equal at both sizes. Successive shifts multiply.
    """
    return math.sqrt(pixels / base_pixels)


def share_below(sigma_of_u: Callable[[Tensor], Tensor], sigma: float) -> float:
    """Return the u with `sigma_of_u(u) = sigma`, that is P(sampled sigma < `sigma`), by bisection in float64."""
    if sigma <= 0 or sigma >= 1:
        return float(sigma >= 1)
    low, high = 0.0, 1.0
    for _ in range(64):
        middle = (low + high) / 2
        below = sigma_of_u(torch.tensor(middle, dtype=torch.float64)).item() < sigma
        low, high = (middle, high) if below else (low, middle)
    return high


def truncated(sigma_of_u: Callable[[Tensor], Tensor], low: float, high: float) -> Callable[[Tensor], Tensor]:
    """Return the inverse CDF of the density truncated to [`low`, `high`], by restricting u."""
    first, last = share_below(sigma_of_u, low), share_below(sigma_of_u, high)
    return lambda u: sigma_of_u(first + (last - first) * u)

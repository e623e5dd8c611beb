"""Timestep densities, each written as its inverse CDF, a function of u ~ Uniform(0, 1).

A sample then needs one uniform number, and the shift is applied to the result. Bounds on sigma are bounds on u. The
mean of any function of sigma is an integral over u (see `weighting.mean_over_sigma`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_KNOTS, _LAST_LOGIT = 1 << 15, 30.0
"""Size of a tabulated CDF, and its largest |logit(sigma)|, where sigma is within 1e-13 of 0 or 1."""


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


def beta(u: Tensor, alpha: float, beta: float) -> Tensor:
    """sigma ~ Beta(alpha, beta), of mean alpha / (alpha + beta), from a table.

    The error is below 1e-7 max(alpha, beta, 1) for alpha and beta from 0.05 to 100.
    """
    return _beta_table(alpha, beta)(u)


@functools.lru_cache(maxsize=8)
def _beta_table(alpha: float, beta: float) -> Callable[[Tensor], Tensor]:
    """Return the inverse CDF of Beta(alpha, beta), integrated over logit(sigma), where the density is smooth."""

    def density(logits: Tensor) -> Tensor:  # not normalised
        return torch.exp(
            alpha * torch.nn.functional.logsigmoid(logits) + beta * torch.nn.functional.logsigmoid(-logits)
        )

    logits = _logits()
    middles = (logits[1:] + logits[:-1]) / 2
    at = density(logits)
    cells = (at[1:] + 4 * density(middles) + at[:-1]) * (logits[1] - logits[0]) / 6  # Simpson's rule
    below = at[:1] / alpha  # the tails, where one factor of the density is 1
    cdf = torch.cat([below, below + cells.cumsum(0)])
    return _inverse(cdf / (cdf[-1] + at[-1] / beta))


def mixture(parts: Sequence[Callable[[Tensor], Tensor]], shares: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Return the inverse CDF of a mixture of densities, given by inverse CDFs, from a table; shares are relative."""
    sigmas = torch.sigmoid(_logits())
    cdfs = torch.stack([_shares_below(part, sigmas) for part in parts])
    return _inverse(cdfs.new_tensor(shares) @ cdfs / sum(shares))


def _logits() -> Tensor:
    return torch.linspace(-_LAST_LOGIT, _LAST_LOGIT, _KNOTS, dtype=torch.float64)


def _shares_below(sigma_of_u: Callable[[Tensor], Tensor], sigmas: Tensor) -> Tensor:
    """Return the CDF at `sigmas`, by bisection of the inverse CDF."""
    low, high = torch.zeros_like(sigmas), torch.ones_like(sigmas)
    for _ in range(54):
        middle = (low + high) / 2
        below = sigma_of_u(middle) < sigmas
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def _inverse(cdf: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the inverse of a CDF that is known at the logits of `_logits`, linear in the logit between them."""
    logits = _logits()

    def sigma_of_u(u: Tensor) -> Tensor:
        after = torch.searchsorted(cdf, u.contiguous()).clamp(1, len(cdf) - 1)
        low, high = cdf[after - 1], cdf[after]
        part = ((u - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        return torch.sigmoid(torch.lerp(logits[after - 1], logits[after], part))

    return sigma_of_u


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

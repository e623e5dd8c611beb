"""How sigma is drawn: every density is written as its inverse CDF, a function of u ~ Uniform(0, 1).

So a draw needs one uniform number, the shift is one more function behind it, and the mean of any function of sigma
is an integral over u (see `weighting.mean_over_sigma`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """sigma = sigmoid(mean + std * n), n standard normal (Esser et al. 2024, eq. 19).

    `u` is any shape, in (0, 1); float64 is advised. Positive `mean` means more noise.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def uniform(u: Tensor) -> Tensor:
    """sigma = u, as in the original rectified flow (Liu et al. 2022)."""
    return u


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """`shift * s / (1 + (shift - 1) * s)` (Esser et al. 2024, eq. 23); 1 changes nothing, more means more noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)

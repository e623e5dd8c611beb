"""A limit on drift: the weight of the preserved predictions is steered while a run trains.

The drift of a step is the relative change of the preserved predictions, over all of its prior samples:

    drift = sqrt(sum |v - v_base|^2 / sum |v_base|^2)

After each step the weight is multiplied by exp(RATE * e), where e = drift / limit - 1, at most 1. It settles where the
drift is at the limit on average, or at the least weight if the drift stays below it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RATE = 0.05
LEAST, MOST = 1 / 64, 64.0
"""Bounds of the factor on the prior's weight."""


class DriftLimit:
    """The factor on the weight of the preserved predictions, and the measurement that steers it. On the device."""

    def __init__(self, limit: float, device: torch.device) -> None:
        self.limit = limit
        self.factor = torch.ones((), device=device)
        """The factor of the next step, a scalar; part of a checkpoint."""
        self._sums = torch.zeros(2, device=device)

    def weighted(self, losses: Tensor, kept: slice) -> Tensor:
        """Return the samples' `losses` [B], with those of the `kept` samples multiplied by the factor."""
        factors = torch.ones_like(losses)
        factors[kept] = self.factor
        return losses * factors

    def measure(self, prediction: Tensor, targets: Tensor, kept: slice) -> None:
        """Add the `kept` samples of a micro-step: predictions and the base's, both [B, C, H, W]."""
        base = targets[kept].float()
        change = prediction.detach()[kept].float() - base
        self._sums += torch.stack([change.square().sum(), base.square().sum()])

    def update(self, reduce_mean: Callable[[Tensor], Tensor]) -> Tensor:
        """Steer the factor by the step's drift over all processes. A drift that is not finite changes nothing.

        Return the drift, NaN without samples, and the factor that the step used, [2].
        """
        change, size = reduce_mean(self._sums)
        drift = (change / size).sqrt()
        excess = torch.nan_to_num(drift / self.limit - 1, nan=0.0, posinf=0.0).clamp(max=1)
        measured = torch.stack([drift, self.factor])
        self.factor.mul_(torch.exp(RATE * excess)).clamp_(LEAST, MOST)
        self._sums.zero_()
        return measured

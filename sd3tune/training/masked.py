"""Masks of a batch: weights of the loss at latent positions, and where the base's own prediction is the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sd3tune.data.store import Store
from sd3tune.flow.objective import position_weights
from sd3tune.training.examples import Example


def read_positions(store: Store, chosen: Sequence[tuple[Example, int]], shape: Sequence[int]) -> dict[str, Tensor]:
    """Return `position_weights` and `from_base` of a `Batch`, those that it needs, each [B, h, w] fp32.

    `chosen` has an example and the number of its variant for each sample; `shape` is (h, w).
    """
    if not any(example.mask for example, _ in chosen):
        return {}
    weights, from_base = torch.ones(len(chosen), *shape), torch.zeros(len(chosen), *shape)
    for row, (example, variant) in enumerate(chosen):
        if example.mask is not None:
            mask = store.get(example.mask.keys[variant])["mask"]
            weights[row] = position_weights(mask, example.mask.outside_weight)
            from_base[row] = 1 - mask if example.mask.keeps_base else 0
    return {"position_weights": weights, **({"from_base": from_base} if from_base.any() else {})}

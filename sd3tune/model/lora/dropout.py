"""Dropout with a mask that follows from a seed: no random state to save, and the same mask in recomputed blocks."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


class SeededDropout(nn.Module):
    """Dropout that is active from `draw(seed)` to `draw(None)`, whatever `train()` and `eval()` set.

    It scales the kept values by 1 / (1 - share). The mask depends on the seed, `name`, and the input's shape and device
    only, so gradient checkpointing draws the same mask again.
    """

    def __init__(self, share: float, name: str) -> None:
        super().__init__()
        self.share = share
        self._salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        self._seed: int | None = None

    def draw(self, seed: int | None) -> None:
        """Use the mask of `seed` (below 2^63) from now on; None turns dropout off."""
        self._seed = None if seed is None else seed ^ self._salt

    @property
    def is_drawn(self) -> bool:
        """True while dropout is active."""
        return self._seed is not None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return a tensor like `inputs`; only a boolean mask is kept for the backward pass."""
        if self._seed is None:
            return inputs
        dropped = torch.empty(inputs.shape, dtype=torch.bool, device=inputs.device)
        if not inputs.is_meta:  # the meta device has neither values nor generators
            dropped.bernoulli_(self.share, generator=torch.Generator(inputs.device).manual_seed(self._seed))
        return inputs.masked_fill(dropped, 0) / (1 - self.share)

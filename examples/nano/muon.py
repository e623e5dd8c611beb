"""Muon for the kernels and matrices of a module, AdamW for its biases and norms, behind one `step`.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes the update of a matrix orthogonal. A kernel
[out, in, 3, 3] is treated as a matrix [out, in * 9].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MuonAndAdamW:
    """Muon and AdamW in one. `learning_rate` is AdamW's: Muon's updates are scaled to the same root mean square."""

    def __init__(self, module: nn.Module, learning_rate: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._kernels = [parameter for parameter in parameters if parameter.ndim >= 2]
        self._matrices = [
            kernel.detach().flatten(1) for kernel in self._kernels
        ]  # views, so that a step changes the kernels
        self._optimizers = (
            torch.optim.Muon(self._matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([p for p in parameters if p.ndim < 2], betas=betas, weight_decay=0.0, fused=True),
        )
        self._learning_rate = learning_rate

    def step(self, share: float = 1.0) -> None:
        """Update with `share` of the learning rate, and clear the gradients."""
        for matrix, kernel in zip(self._matrices, self._kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * self._learning_rate
            optimizer.step()
            optimizer.zero_grad()
        for kernel in self._kernels:
            kernel.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._optimizers[0].state_dict(), "adamw": self._optimizers[1].state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, name in zip(self._optimizers, ("muon", "adamw"), strict=True):
            optimizer.load_state_dict(state[name])

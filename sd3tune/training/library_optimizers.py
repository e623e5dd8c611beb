"""Optimizers that torch, schedulefree and bitsandbytes provide, used as they are: see `host_stepped`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sd3tune.config.sections.optimizer import (
    AdafactorConfig,
    MuonConfig,
    PagedAdamW8bitConfig,
    ScheduleFreeConfig,
)


def make_muon(settings: MuonConfig, matrices: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Return torch's Muon (Jordan 2024) for the matrices, and its AdamW for biases, scales and convolutions, if any.

    An update has the size of AdamW's (Liu et al. 2025), so that both take one learning rate.
    """
    beta1, beta2 = settings.betas
    flat = [matrix for matrix in matrices.values() if matrix.ndim == 2]
    others = [matrix for matrix in matrices.values() if matrix.ndim != 2]
    made: list[torch.optim.Optimizer] = []
    if flat:
        muon = torch.optim.Muon(
            flat,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            ns_steps=settings.ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )
        made.append(muon)
    if others:
        made.append(
            torch.optim.AdamW(
                others, lr=settings.lr, betas=(beta1, beta2), eps=settings.eps, weight_decay=settings.weight_decay
            )
        )
    return made


def muon_values(shape: torch.Size) -> int:
    """Return the number of fp32 values that Muon keeps for a tensor: momentum, or AdamW's two moments."""
    return shape.numel() * (1 if len(shape) == 2 else 2)


def make_adafactor(settings: AdafactorConfig, matrices: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Return torch's Adafactor (Shazeer & Stern 2018). It reads three numbers per matrix from the device."""
    return [
        torch.optim.Adafactor(
            list(matrices.values()),
            lr=settings.lr,
            beta2_decay=settings.beta2_decay,
            eps=(None, settings.smallest_scale),
            d=settings.clip,
            weight_decay=settings.weight_decay,
        )
    ]


def adafactor_values(shape: torch.Size) -> int:
    """Return the number of fp32 values that Adafactor keeps for a tensor: one per row and per column."""
    if len(shape) < 2:
        return shape.numel()
    return shape.numel() // shape[-1] + shape.numel() // shape[-2]


def make_schedule_free(settings: ScheduleFreeConfig, master: nn.Parameter) -> torch.optim.Optimizer:
    """Return the authors' schedule-free AdamW (Defazio et al. 2024), in training mode: the master holds its y."""
    from schedulefree import AdamWScheduleFree

    beta1, beta2 = settings.betas
    optimizer = AdamWScheduleFree(
        [master],
        lr=settings.lr,
        betas=(beta1, beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        r=settings.r,
        weight_lr_power=settings.weight_lr_power,
        foreach=False,
    )
    optimizer.train()
    made: torch.optim.Optimizer = optimizer
    return made


def averaged(settings: ScheduleFreeConfig, master: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Return schedule-free's average x from y = (1 - beta1) z + beta1 x, as its `eval` does; y before the first step.

    The master is left as it is: `eval` and `train` would round it.
    """
    return master.lerp(state["z"], 1 - 1 / settings.betas[0]) if "z" in state else master


def make_paged_adamw8bit(settings: PagedAdamW8bitConfig, master: nn.Parameter) -> torch.optim.Optimizer:
    """Return bitsandbytes' PagedAdamW8bit with its state allocated: on a GPU, it lies in pages that can be evicted.

    On the CPU the library allocates ordinary memory.
    """
    from bitsandbytes.optim.adamw import PagedAdamW8bit

    beta1, beta2 = settings.betas
    optimizer: torch.optim.Optimizer = PagedAdamW8bit(
        [master], lr=settings.lr, betas=(beta1, beta2), eps=settings.eps, weight_decay=settings.weight_decay
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        optimizer.init_state(optimizer.param_groups[0], master, 0, 0)  # type: ignore[attr-defined]
    return optimizer

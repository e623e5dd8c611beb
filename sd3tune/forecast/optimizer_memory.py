"""Memory of an optimizer: its state, and the temporary tensors of an update."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sd3tune.config import Config
from sd3tune.forecast.footprint import bytes_of, peak_of
from sd3tune.forecast.thinning import Thinned
from sd3tune.training.flat_master import FlatMaster, LossScale
from sd3tune.training.optimizers import OPTIMIZERS, make_optimizer, state_tensors
from sd3tune.training.step import TrainState, update

_TRIAL_SIZE = 1 << 16
"""Number of parameters in the optimizer rehearsal. State is proportional to it, and so is an update's working memory,
up to the optimizer's chunk."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one phase: `resident` throughout, and `working` on top of it at the peak."""

    resident: int
    working: int

    @property
    def peak(self) -> int:
        return self.resident + self.working


@dataclass(frozen=True)
class MatrixState:
    """The state of an optimizer that treats each matrix as a whole."""

    nbytes: int
    largest: int
    """Number of values in the largest trained tensor; one is updated at a time."""


def matrix_state(config: Config, shapes: Mapping[str, torch.Size], thin: Thinned, stand_in: str) -> MatrixState | None:
    """Return the state of an optimizer that treats each matrix as a whole; None for any other.

    `shapes` are those of the trained tensors; the one named `stand_in` stands for the omitted blocks'.
    """
    values_of = OPTIMIZERS[config.optimizer.kind].matrix_values
    if values_of is None:
        return None
    known = [shape for name, shape in shapes.items() if name != stand_in]
    omitted = thin.omitted_sum(lambda block: sum(values_of(of.shape) for of in block.parameters() if of.requires_grad))
    return MatrixState(4 * (sum(map(values_of, known)) + omitted), max(shape.numel() for shape in known))


def rehearse_optimizer(
    config: Config, values: int, together: int | None = None, matrices: MatrixState | None = None
) -> MemoryUse:
    """Return the state for `values` parameters, and the working memory to update `together` of them, or all.

    Both are measured for `_TRIAL_SIZE` parameters on the CPU, except for the state of `matrices`.
    """
    side = math.isqrt(_TRIAL_SIZE)
    master = FlatMaster({"probed": nn.Parameter(torch.zeros(side, side))}, torch.float32)
    optimizer = make_optimizer(config.optimizer, master.master, master.named(master.master))
    state = TrainState(0, master, optimizer, None, LossScale(master.master.device, enabled=False))
    for _ in range(2):  # the first step creates the state
        master.gradient.fill_(1.0)
        footprint = peak_of(lambda: update(state, config, config.optimizer.lr, lambda gradient: gradient))
    if matrices is not None:
        return MemoryUse(matrices.nbytes, footprint.peak * matrices.largest // _TRIAL_SIZE)
    kept = [value for value in state_tensors(optimizer, master.master).values() if value.ndim]
    at_a_time = min(together or values, getattr(optimizer, "chunk", None) or values)
    return MemoryUse(bytes_of(kept) * values // _TRIAL_SIZE, footprint.peak * at_a_time // _TRIAL_SIZE)

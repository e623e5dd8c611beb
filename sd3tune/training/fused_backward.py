"""Weights are updated inside the backward pass, so that no gradient of the whole model exists.

The flat master is divided into groups of neighbouring values. Each gradient moves to its group as soon as it is there,
and the optimizer updates a complete group. The rest of the backward pass does not need those weights: each layer
computes all of its gradients together.

Nothing may depend on the whole gradient before an update: neither clipping nor skipping. A gradient that is not finite
is found afterwards, when the weights are spoilt (see `loop`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sd3tune.model.lora.targets import block_of
from sd3tune.training.flat_master import FlatMaster, clip_
from sd3tune.training.optimizers import BLOCK, Sliced

LEAST_VALUES = BLOCK << 16
"""A group ends at the first parameter that makes it as large, and with each transformer block: 64 MiB in fp32."""


@dataclass
class _Group:
    """Values `start` to `end` of the master; both are multiples of `BLOCK`, except for the end of the last group."""

    start: int
    end: int
    parameters: int = 0
    """Number of parameters with values in the group. Two groups may share one."""
    waiting: int = 0
    """Number of those whose gradient has not come yet."""
    gradient: Tensor | None = None
    """fp32, from the first to the last of its gradients."""


@dataclass(frozen=True)
class _Part:
    """The values of a parameter in one group."""

    group: _Group
    in_group: slice
    in_parameter: slice


class FusedBackward:
    """The updates of one step at a time: `begin`, then the backward pass, then `finish`.

    `without` is the name of a last parameter that gets no gradient: a rehearsal's stand-in for others.
    """

    def __init__(self, master: FlatMaster, optimizer: torch.optim.Optimizer, without: str | None = None) -> None:
        self.master, self.optimizer = master, cast(Sliced, optimizer)
        names = [name for name in master.shapes if name != without]
        self._groups = list(_groups(names, master.sizes))
        self._parts = list(_parts(self._groups, master.sizes[: len(names)]))
        self._missing: set[int] = set()
        """Numbers of the parameters whose gradient has not come yet."""
        self._norms: list[Tensor] = []
        self._reduce_mean: Callable[[Tensor], Tensor] = lambda gradient: gradient
        for number, parameter in zip(range(len(names)), master.parameters, strict=False):
            parameter.register_post_accumulate_grad_hook(functools.partial(self._take, number))

    @property
    def most_values(self) -> int:
        """Number of values in the largest group."""
        return max(group.end - group.start for group in self._groups)

    def begin(self, lr: float, reduce_mean: Callable[[Tensor], Tensor]) -> None:
        """Prepare for a backward pass; `reduce_mean` averages a tensor over the processes, in place."""
        self.optimizer.param_groups[0]["lr"] = lr
        self._reduce_mean = reduce_mean
        self._norms.clear()
        self._missing = set(range(len(self._parts)))
        for group in self._groups:
            group.waiting, group.gradient = group.parameters, None

    def finish(self) -> Tensor:
        """Update parameters without a gradient, for which it is zero. Return the gradient's norm, a scalar."""
        for number in sorted(self._missing):
            parameter = self.master.parameters[number]
            parameter.grad = torch.zeros_like(parameter)
            self._take(number, parameter)
        self.optimizer.finish()
        return torch.linalg.vector_norm(torch.stack(self._norms))

    @torch.no_grad()
    def _take(self, number: int, parameter: Tensor) -> None:
        """Move a parameter's gradient to its groups, and update those that are complete."""
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.reshape(-1), None
        self._missing.discard(number)
        for part in self._parts[number]:
            group = part.group
            if group.gradient is None:
                group.gradient = self.master.master.new_empty(group.end - group.start)
            group.gradient[part.in_group] = gradient[part.in_parameter]
            group.waiting -= 1
            if not group.waiting:
                self._update(group)

    def _update(self, group: _Group) -> None:
        assert group.gradient is not None
        gradient, group.gradient = self._reduce_mean(group.gradient), None
        self._norms.append(clip_(gradient, None))
        self.optimizer.update_slice(group.start, gradient)
        self.master.publish(slice(group.start, group.end))


def _groups(names: Sequence[str], sizes: Sequence[int]) -> Iterator[_Group]:
    total = sum(sizes[: len(names)])
    start = end = 0
    for name, size, following in zip(names, sizes, [*names[1:], None], strict=False):
        end += size
        rounded = total if following is None else min(-(-end // BLOCK) * BLOCK, total)
        is_last_of_block = following is None or block_of(following) != block_of(name)
        if rounded > start and (is_last_of_block or end - start >= LEAST_VALUES):
            yield _Group(start, rounded)
            start = rounded


def _parts(groups: Sequence[_Group], sizes: Sequence[int]) -> Iterator[list[_Part]]:
    """Yield the parts of each parameter, and count the groups' parameters."""
    start = 0
    for size in sizes:
        parts = []
        for group in groups:
            first, last = max(start, group.start), min(start + size, group.end)
            if first < last:
                in_group = slice(first - group.start, last - group.start)
                parts.append(_Part(group, in_group, slice(first - start, last - start)))
                group.parameters += 1
        yield parts
        start += size

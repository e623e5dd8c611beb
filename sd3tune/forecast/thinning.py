"""Rehearsal of a deep model on few of its blocks.

Equal blocks in a row allocate, keep and compute the same. One of them is therefore measured, in the forward and in the
backward pass, and counted as often as there are such blocks. The first two and the last block of a row are measured
themselves, as they may free or keep other blocks' tensors. Sums are exact, and so is the peak, as it is taken over
every repetition.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.errors import UserError
from sd3tune.forecast.footprint import Footprint, SavedTensors, fused_attention, tensors_of
from sd3tune.methods import Method
from sd3tune.model.compute.hoist import keep_blocks

LEAD = 2
"""Number of blocks measured themselves at the beginning of a row of equal blocks; at its end it is one."""


@dataclass(frozen=True)
class Thinned:
    """A transformer without some of its blocks; the remaining blocks keep their names."""

    transformer: SD3Transformer2DModel
    counts: dict[int, int]
    """Number of each remaining block -> how many blocks it stands for."""

    def remaining_of_first(self, blocks: int | None) -> int | None:
        """Return how many of the whole model's first `blocks` blocks remain; None stands for all."""
        return None if blocks is None else sum(number < blocks for number in self.counts)

    def omitted_sum(self, measure: Callable[[nn.Module], int]) -> int:
        """Return the sum of `measure` over all omitted blocks."""
        return sum((count - 1) * measure(block) for block, count in self.blocks() if count > 1)

    def blocks(self) -> Iterator[tuple[nn.Module, int]]:
        return zip(self.transformer.transformer_blocks, self.counts.values(), strict=True)

    def remaining_modulation(self, modulation: Sequence[Tensor]) -> list[Tensor]:
        """Return the adaLN modulations of the remaining blocks and the last layer, from the whole model's."""
        *blocks, last = modulation
        return [one for number in self.counts for one in blocks[2 * number : 2 * number + 2]] + [last]

    def omitted_contribution(self, measure: Callable[[str], int]) -> int:
        """Return the omitted blocks' contribution to `measure(name)`, a measurement of the model without block `name`.

        An empty name stands for the model with all remaining blocks.
        """
        children = self.transformer.transformer_blocks._modules
        every, total = dict(children), 0
        for number, count in self.counts.items():
            if count > 1:
                whole = measure("")
                del children[str(number)]
                total += (count - 1) * (whole - measure(f"transformer_blocks.{number}."))
                children.clear()
                children.update(every)
        return total

    def measured(self, compute: Callable[[Account], object], saved: SavedTensors | None = None) -> Account:
        """Return the cost of one call for the whole model. `compute` gets the account, to mark further parts."""
        with fused_attention(), Footprint() as footprint:
            parts = Account(footprint, saved)
            hooks = [hook for block, count in self.blocks() for hook in parts.follow(block, count)]
            try:
                compute(parts)
            finally:
                for hook in hooks:
                    hook.remove()
            parts.mark()
        return parts


class Account:
    """The cost of a computation, summed part by part; a part may count several times."""

    def __init__(self, footprint: Footprint, saved: SavedTensors | None) -> None:
        self.peak = self.flops = self.saved = 0
        self._footprint, self._saved, self._backward = footprint, saved, False
        self._level, self._count, self._start = 0, 1, self._now()

    def _now(self) -> tuple[int, int, int]:
        return self._footprint.now, self._footprint.flops, self._saved.nbytes if self._saved else 0

    def mark(self, count: int = 1, freed: int = 0) -> None:
        """End a part, and begin one that happens `count` times; `freed` bytes were freed in between."""
        start, now, times = self._start, self._now(), self._count
        added = now[0] - start[0]
        before_the_highest = self._level + max(0, (times - 1) * added)
        self.peak = max(self.peak, before_the_highest + self._footprint.lap() - start[0])
        self._level += times * added - freed
        self.flops += times * (now[1] - start[1])
        self.saved += times * (now[2] - start[2])
        self._count, self._start = count, now

    def follow(self, block: nn.Module, count: int) -> list[Any]:
        """Begin a part at each forward and backward pass of a block. Return the hooks, to be removed later."""

        def forward(*_: object) -> None:
            if not self._backward:  # else it is recomputed as part of its backward pass
                self.mark(count)

        def backward(_: Tensor) -> None:
            self._backward = True
            self.mark(count)

        def watch(_: nn.Module, __: object, outputs: Sequence[Tensor]) -> None:
            if outputs[1].requires_grad and not self._backward:
                outputs[1].register_hook(backward)

        return [block.register_forward_pre_hook(forward), block.register_forward_hook(watch)]


def thin_out(transformer: SD3Transformer2DModel, method: Method, checkpointed: int | None) -> Thinned:
    """Remove blocks that are equal to a neighbour; `checkpointed` is the number of checkpointed blocks, None for all.

    No block is removed if the method trains equal blocks differently, or names a block that would be removed.
    """
    blocks = list(transformer.transformer_blocks)
    selected, trained = method.select(transformer), _trained(method, transformer)
    kinds = [
        (
            tuple((tensor.shape, tensor.dtype) for tensor in tensors_of(block)),
            tuple(name.split(".", 2)[2] for name in selected if name.startswith(f"transformer_blocks.{number}.")),
            checkpointed is None or number < checkpointed,
        )
        for number, block in enumerate(blocks)
    ]
    counts: dict[int, int] = {}
    for _, row in itertools.groupby(range(len(blocks)), kinds.__getitem__):
        numbers = list(row)
        stands_for = max(1, len(numbers) - LEAD - 1)
        counts.update(dict.fromkeys([*numbers[:LEAD], *numbers[-1:]], 1))
        if len(numbers) > LEAD + 1:
            counts[numbers[LEAD]] = stands_for
    thin = Thinned(transformer, dict(sorted(counts.items())))
    keep_blocks(transformer, counts)
    try:
        added = thin.omitted_contribution(lambda _: _trained(method, transformer))
        equal = _trained(method, transformer) + added == trained
    except UserError:
        equal = False
    if equal:
        return thin
    transformer.transformer_blocks = nn.ModuleList(blocks)
    keep_blocks(transformer, range(len(blocks)))
    return Thinned(transformer, dict.fromkeys(range(len(blocks)), 1))


def _trained(method: Method, transformer: nn.Module) -> int:
    return sum(row.parameters for row in method.coverage(transformer))

"""Rehearsing a deep model on few of its blocks: of a run of equal blocks, one stands for all that cost the same.

What an equal block allocates, keeps and computes is the same as what its neighbour does, so each block's part of a
forward and of a backward pass is measured once and counted as often as there are such blocks. The first two and the
last of a run stand for themselves: what they free or leave may be of other blocks. Sums are exact, and so is the peak,
as it is looked for in each repetition.
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
"""Blocks at the beginning of a run that stand for themselves; one does at its end."""


@dataclass(frozen=True)
class Thinned:
    """A transformer that lost some of its blocks; those that are left keep their names."""

    transformer: SD3Transformer2DModel
    counts: dict[int, int]
    """Number of each block that is left -> how many blocks it stands for."""

    def first(self, blocks: int | None) -> int | None:
        """Return how many of the first `blocks` blocks of the whole model are left; None stands for all."""
        return None if blocks is None else sum(number < blocks for number in self.counts)

    def rest(self, measure: Callable[[nn.Module], int]) -> int:
        """Return what `measure` gives for all the blocks that were left out, together."""
        return sum((count - 1) * measure(block) for block, count in self.blocks() if count > 1)

    def blocks(self) -> Iterator[tuple[nn.Module, int]]:
        return zip(self.transformer.transformer_blocks, self.counts.values(), strict=True)

    def left(self, modulation: Sequence[Tensor]) -> list[Tensor]:
        """Return the adaLN modulations of the blocks that are left, and the last layer's, from those of all blocks."""
        *blocks, last = modulation
        return [one for number in self.counts for one in blocks[2 * number : 2 * number + 2]] + [last]

    def omitted_contribution(self, measure: Callable[[str], int]) -> int:
        """Return as `rest` does what a block adds to `measure`, which gets the name of one that the model then lacks.

        With an empty name it lacks none.
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
        """Return what one call takes of the whole model; `compute` gets the account, to mark parts of its own."""
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
    """An account of a computation, part by part, each of which may happen several times."""

    def __init__(self, footprint: Footprint, saved: SavedTensors | None) -> None:
        self.peak = self.flops = self.saved = 0
        self._footprint, self._saved, self._backward = footprint, saved, False
        self._level, self._count, self._start = 0, 1, self._now()

    def _now(self) -> tuple[int, int, int]:
        return self._footprint.now, self._footprint.flops, self._saved.nbytes if self._saved else 0

    def mark(self, count: int = 1, freed: int = 0) -> None:
        """End a part, and begin one that happens `count` times; `freed` bytes are not there any more in between."""
        start, now, times = self._start, self._now(), self._count
        added = now[0] - start[0]
        before_the_highest = self._level + max(0, (times - 1) * added)
        self.peak = max(self.peak, before_the_highest + self._footprint.lap() - start[0])
        self._level += times * added - freed
        self.flops += times * (now[1] - start[1])
        self.saved += times * (now[2] - start[2])
        self._count, self._start = count, now

    def follow(self, block: nn.Module, count: int) -> list[Any]:
        """Begin a part wherever the block computes, and where its backward pass begins; returns hooks to remove."""

        def forward(*_: object) -> None:
            if not self._backward:  # else it is computed again, which is a part of its backward pass
                self.mark(count)

        def backward(_: Tensor) -> None:
            self._backward = True
            self.mark(count)

        def watch(_: nn.Module, __: object, outputs: Sequence[Tensor]) -> None:
            if outputs[1].requires_grad and not self._backward:
                outputs[1].register_hook(backward)

        return [block.register_forward_pre_hook(forward), block.register_forward_hook(watch)]


def thin_out(transformer: SD3Transformer2DModel, method: Method, checkpointed: int | None) -> Thinned:
    """Leave out what is equal; `checkpointed` is the number of blocks at the beginning that are, None for all.

    Nothing is left out where the method does not train equal blocks equally, or names a block that would be gone.
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
    for _, run in itertools.groupby(range(len(blocks)), kinds.__getitem__):
        numbers = list(run)
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

"""Attention that a checkpointed block keeps, so that its recomputation does not attend again.

The results of a recomputation are thrown away: it only makes the tensors that the backward pass needs. Attention's own
backward pass needs queries, keys and values, which are recomputed, and a few small tensors of its kernel besides the
output, such as the logarithm of each row's sum. These tensors are kept with the output, for every kernel. A kernel that
keeps the matrix of all token pairs is recomputed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query, key, value) -> softmax(query key^T / sqrt(width)) value, all [B, heads, tokens, width]."""

LIMIT = 2
"""Tensors of a kernel are kept up to this many times its output's bytes."""
_OUTPUT = -1
_current = threading.local()  # a backward pass on a GPU recomputes blocks in a thread of its own


def attend(compute: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return `compute(query, key, value)`, or the kept result in a block that is recomputed."""
    kept: _Kept | None = getattr(_current, "kept", None)
    return compute(query, key, value) if kept is None else kept.attend(compute, query, key, value)


def checkpoint_but_attention(block: nn.Module, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the block's outputs. Only its inputs and the tensors kept by `attend` live until the backward pass.

    Gradients are bit-equal to the block's own.
    """
    kept = _Kept()
    outputs = checkpoint(kept.run, block, *inputs, use_reentrant=False)
    return _Keep.apply(kept.calls, *outputs)


class _Kept:
    """The attentions of one block, in their order. A pass through the block makes them; each later pass reuses them.

    `calls` has the tensors of each by number: its inputs, then what else its kernel keeps, and the output.
    """

    def __init__(self) -> None:
        self.calls: list[dict[int, Tensor]] = []
        self._next = 0

    def run(self, block: nn.Module, *inputs: Any) -> Sequence[Tensor | None]:
        outer, _current.kept, self._next = getattr(_current, "kept", None), self, 0
        try:
            outputs: Sequence[Tensor | None] = block(*inputs)
            return outputs
        finally:
            _current.kept = outer

    def attend(self, compute: Attend, *inputs: Tensor) -> Tensor:
        is_new = self._next == len(self.calls)
        if is_new:
            self.calls.append({})
        held = self.calls[self._next]
        self._next += 1
        output = held.pop(_OUTPUT, None)
        if output is None:
            held.clear()
            output = _computed(compute, inputs, held)
            if is_new and sum(tensor.nbytes for tensor in held.values()) <= LIMIT * output.nbytes:
                held[_OUTPUT] = output.detach()
            elif is_new:
                held.clear()
        result: Tensor = _Recompute.apply(held, output, *inputs)
        return result


def _computed(compute: Attend, inputs: Sequence[Tensor], held: dict[int, Tensor]) -> Tensor:
    """Return attention's output. Put into `held` what its backward pass takes from there, except for the inputs."""
    numbers = {_form(tensor): number for number, tensor in enumerate(inputs)}
    first = len(inputs)  # autograd holds `pack`, which must not hold the inputs

    def pack(tensor: Tensor) -> int:
        number = numbers.get(_form(tensor))
        if number is None:
            number = first + len(held)
            held[number] = tensor.detach()
        return number

    with saved_tensors_hooks(pack, held.pop):
        return compute(*inputs)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


class _Recompute(torch.autograd.Function):
    """The output as it is. The backward pass begins with the inputs, which the checkpoint recomputes."""

    @staticmethod
    def forward(ctx: Any, held: dict[int, Tensor], output: Tensor, *inputs: Tensor) -> Tensor:
        ctx.held = held
        ctx.save_for_backward(*inputs)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        ctx.held.update(enumerate(inputs))
        return None, gradient, *[None for _ in inputs]


class _Keep(torch.autograd.Function):
    """The block's outputs as they are. Outside the checkpoint, it keeps the calls' tensors for the backward pass."""

    @staticmethod
    def forward(ctx: Any, calls: list[dict[int, Tensor]], *outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.places = [(held, number) for held in calls for number in held]
        ctx.save_for_backward(*[held.pop(number) for held, number in ctx.places])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        for (held, number), tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            held[number] = tensor
        return None, *gradients

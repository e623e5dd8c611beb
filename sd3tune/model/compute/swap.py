"""Block swap: the frozen weights of some blocks stay in system memory, and reach the device shortly before their use.

Two buffers on the device hold the weights of two swapped blocks. When a block has been computed, its buffer is filled
with the weights of the swapped block after the next, while the device computes the blocks between: in order in the
forward pass, in reverse in the backward pass. Where the passes meet, the last two blocks are there already.

A block's weights are always the same views of one buffer, so whatever autograd keeps of them is valid again when the
block's backward pass begins. Copies have a stream of their own. Before a copy, it waits for the computation that is
queued by then, of which the buffer's last block is a part. The computation waits for the event of one buffer, not for
later copies. The host waits for neither. The buffers live as long as the model, so the allocator never hands them to
another tensor, and `record_stream` is not needed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BUFFERS = 2
_ALIGNMENT = 256  # bytes: some kernels round differently on weights that are not aligned
_SMALLEST_PIECE = 1 << 20  # bytes
_STATES = ("hidden_states", "encoder_hidden_states")
_ARGUMENTS = (*_STATES, "temb", "joint_attention_kwargs")
"""Arguments of a block; those of `_STATES` come from the block before."""


def swapped_blocks(blocks: int, count: int) -> list[int]:
    """Return the numbers of the swapped blocks: `count` of `blocks`, spread evenly to leave time for their copies."""
    return [index * blocks // count for index in range(count)]


def swapped_weights(block: nn.Module) -> list[Tensor]:
    """Return the weights that are swapped, before adapters are added: matrices of linear layers, quantised or not."""
    return [layer.weight for layer in block.modules() if isinstance(layer, nn.Linear)]


def bytes_saved(transformer: SD3Transformer2DModel, count: int) -> int:
    """Return the bytes of device memory that swapping `count` blocks saves: their weights, less the buffers."""
    sizes = stored_bytes(transformer, count)
    buffers = sum(max(sizes[first::BUFFERS], default=0) for first in range(BUFFERS))
    blocks = transformer.transformer_blocks
    weights = [swapped_weights(blocks[number]) for number in swapped_blocks(len(blocks), count)]
    return sum(weight.nbytes for of_block in weights for weight in of_block) - buffers


def stored_bytes(transformer: SD3Transformer2DModel, count: int) -> list[int]:
    """Return the bytes of system memory that each of `count` swapped blocks takes."""
    blocks = transformer.transformer_blocks
    numbers = swapped_blocks(len(blocks), count)
    return [sum(map(_aligned_bytes, swapped_weights(blocks[number]))) for number in numbers]


class BlockSwap:
    """The swapped blocks of one model: call `store` for each of its blocks, move the model, then call `install`."""

    def __init__(self, blocks: int, count: int, device: torch.device) -> None:
        self.device = device
        self._numbers = swapped_blocks(blocks, count)
        self._stored: list[_Stored] = []
        self._buffers: list[_Buffer] = []
        self._awaited: set[int] = set()
        """Blocks whose backward pass is still to come."""
        self._differentiated: int | None = None
        """The block whose backward pass has begun, and may recompute the block."""

    def store(self, number: int, block: nn.Module) -> None:
        """Move the frozen weights of block `number` to system memory, if it is swapped: pinned for a CUDA device."""
        if number in self._numbers:
            self._stored.append(_Stored(swapped_weights(block), self.device))

    def install(self, transformer: SD3Transformer2DModel) -> None:
        """Let the model, which is on its device, compute with the stored weights."""
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for first in range(BUFFERS):
            of_buffer = self._stored[first::BUFFERS]
            buffer = _Buffer(max(stored.nbytes for stored in of_buffer), self.device, stream)
            for stored in of_buffer:
                stored.view_in(buffer.memory)
            self._buffers.append(buffer)
        transformer.register_forward_pre_hook(self._begin)
        for index, number in enumerate(self._numbers):
            block = transformer.transformer_blocks[number]
            block.register_forward_pre_hook(functools.partial(self._enter, index), with_kwargs=True)
            block.register_forward_hook(functools.partial(self._leave, index))

    def _fill(self, index: int) -> None:
        self._buffers[index % BUFFERS].fill(index, self._stored[index].pieces)

    def _provide(self, index: int) -> None:
        """Let the device wait for the weights of a block; they are on their way, unless the order is unusual."""
        self._fill(index)
        self._buffers[index % BUFFERS].wait()

    def _begin(self, *_: object) -> None:
        self._awaited.clear()
        self._differentiated = None
        for index in range(BUFFERS):
            self._fill(index)

    def _enter(self, index: int, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self._provide(index)
        if self._differentiated == index:  # the block is recomputed
            return None
        named = {**dict(zip(_ARGUMENTS, inputs, strict=False)), **named}
        states = [named[name] for name in _STATES]
        marked = _mark(functools.partial(self._end_backward, index), states)
        return (), {**named, **dict(zip(_STATES, marked, strict=True))}

    def _leave(self, index: int, _: nn.Module, __: object, outputs: tuple[Tensor | None, ...]) -> Any:
        if self._differentiated == index:
            return None
        needed_again = any(of is not None and of.requires_grad for of in outputs)
        if index + BUFFERS < len(self._stored):
            self._fill(index + BUFFERS)
        elif not needed_again:
            self._fill(index % BUFFERS)  # for the next forward pass
        if not needed_again:
            return None
        self._awaited.add(index)
        return _mark(functools.partial(self._begin_backward, index), outputs)

    def _begin_backward(self, index: int) -> None:
        self._awaited.discard(index)
        self._differentiated = index
        self._provide(index)

    def _end_backward(self, index: int) -> None:
        self._differentiated = None
        before = index - BUFFERS
        self._fill(before if before in self._awaited else index % BUFFERS)


class _Stored:
    """The weights of one block in system memory, packed, in a few pieces."""

    def __init__(self, weights: Sequence[Tensor], device: torch.device) -> None:
        self.weights = weights
        self.forms = [(weight.shape, weight.dtype, weight.nbytes) for weight in weights]
        self.nbytes = sum(map(_aligned_bytes, weights))
        packed = torch.zeros(self.nbytes, dtype=torch.uint8, device="meta" if device.type == "meta" else "cpu")
        for weight, part in zip(weights, self._split(packed), strict=True):
            part.copy_(weight.data.contiguous().view(torch.uint8).flatten())
            weight.data = weight.data.new_empty(0)
        self.pieces = _pinned(packed) if device.type == "cuda" else [packed]

    def view_in(self, memory: Tensor) -> None:
        """Make the weights views of a buffer, whatever it holds."""
        for weight, part, (shape, dtype, _) in zip(self.weights, self._split(memory), self.forms, strict=True):
            weight.data = part.view(dtype).view(shape)

    def _split(self, memory: Tensor) -> list[Tensor]:
        """Return the bytes of each weight."""
        starts = itertools.accumulate((_rounded_up(nbytes) for _, _, nbytes in self.forms), initial=0)
        return [memory[start : start + nbytes] for start, (_, _, nbytes) in zip(starts, self.forms, strict=False)]


def _aligned_bytes(weight: Tensor) -> int:
    return _rounded_up(weight.nbytes)


def _rounded_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _pinned(packed: Tensor) -> list[Tensor]:
    """Copy bytes into pinned memory, in pieces of 2^n bytes: torch rounds each up to such a size."""
    pieces = []
    while len(packed):
        size = min(len(packed), max(1 << (len(packed).bit_length() - 1), _SMALLEST_PIECE))
        pieces.append(torch.empty(size, dtype=torch.uint8, pin_memory=True).copy_(packed[:size]))
        packed = packed[size:]
    return pieces


class _Buffer:
    """Memory on the device for the weights of one block at a time."""

    def __init__(self, nbytes: int, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.stream = stream
        """The stream for copies; None on other devices than CUDA, where each copy is done at once."""
        self.copied = None if stream is None else torch.cuda.Event()
        self._holds: int | None = None

    def fill(self, index: int, pieces: Sequence[Tensor]) -> None:
        """Copy the weights of block `index` once the computation that is queued now is done."""
        if self._holds == index:
            return
        self._holds = index
        with self._copying():
            start = 0
            for piece in pieces:
                self.memory[start : (start := start + len(piece))].copy_(piece, non_blocking=True)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        if self.stream is None or self.copied is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.memory.device))
        with torch.cuda.stream(self.stream):
            yield
        self.copied.record(self.stream)

    def wait(self) -> None:
        """Let the computation that is queued from now on wait for the weights."""
        if self.copied is not None:
            torch.cuda.current_stream(self.memory.device).wait_event(self.copied)


def _mark(reached: Callable[[], None], tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the tensors; `reached` is called in the backward pass, once the gradients of all of them are there."""
    differentiated = [of for of in tensors if of is not None and of.requires_grad]
    marked = iter(_Mark.apply(reached, *differentiated)) if differentiated else iter(())
    return tuple(next(marked) if of is not None and of.requires_grad else of for of in tensors)


class _Mark(torch.autograd.Function):
    """The identity, which takes no kernel and no memory."""

    @staticmethod
    def forward(ctx: Any, reached: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.reached = reached
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.reached()
        return (None, *gradients)

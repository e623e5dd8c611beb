"""The fast path: fewer operations for the same results in diffusers' transformer and PEFT's layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

from sd3tune.model.compute.fast import block as fast_block
from sd3tune.model.compute.fast.attention import FastAttention


def use_fast_path(transformer: SD3Transformer2DModel) -> None:
    """Switch the model's blocks to the fast path, with equal outputs and gradients up to rounding.

    Parameters, their names and the state dict do not change.
    """
    for block in transformer.transformer_blocks:
        processors = [FastAttention(attention) for attention in _attentions(block)]
        _switch(block, functools.partial(fast_block.forward, block), processors)


@contextmanager
def plain_path(transformer: SD3Transformer2DModel) -> Iterator[None]:
    """Compute bit-equal to diffusers, with its own modules, inside the context: neither fast nor compiled."""
    swapped = [block for block in transformer.transformer_blocks if "forward" in vars(block)]
    # They are kept, as making new ones reads weights, for which the host waits.
    former = [(block.forward, [attention.processor for attention in _attentions(block)]) for block in swapped]
    for block in swapped:
        del block.forward
        for attention in _attentions(block):
            attention.set_processor(JointAttnProcessor2_0())
    try:
        yield
    finally:
        for block, (forward, processors) in zip(swapped, former, strict=True):
            _switch(block, forward, processors)


def _switch(block: JointTransformerBlock, forward: Callable[..., Any], processors: Sequence[Any]) -> None:
    block.forward = forward
    for attention, processor in zip(_attentions(block), processors, strict=True):
        attention.set_processor(processor)


def _attentions(block: JointTransformerBlock) -> list[Attention]:
    return [attention for attention in (block.attn, block.attn2) if attention is not None]

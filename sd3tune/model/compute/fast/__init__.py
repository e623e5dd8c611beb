"""The fast path: diffusers' own transformer and PEFT's own layers, computing the same in fewer operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

from sd3tune.model.compute.fast import block as fast_block
from sd3tune.model.compute.fast.attention import FastAttention


def use_fast_path(transformer: SD3Transformer2DModel) -> None:
    """From now on the model's blocks compute the fast way: equal outputs and gradients up to rounding.

    Parameters, their names and the state dict stay as they are.
    """
    for block in transformer.transformer_blocks:
        block.forward = functools.partial(fast_block.forward, block)
        _set_processors(block, FastAttention)


@contextmanager
def plain_path(transformer: SD3Transformer2DModel) -> Iterator[None]:
    """Compute with diffusers' own modules while the context lasts, bit for bit."""
    fast = [block for block in transformer.transformer_blocks if "forward" in vars(block)]
    for block in fast:
        del block.forward
        _set_processors(block, lambda _: JointAttnProcessor2_0())
    try:
        yield
    finally:
        if fast:
            use_fast_path(transformer)


def _set_processors(block: JointTransformerBlock, make: Callable[[Attention], Any]) -> None:
    for attention in (block.attn, block.attn2):
        if attention is not None:
            attention.set_processor(make(attention))

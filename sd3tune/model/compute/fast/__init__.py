"""The fast path: fewer operations for the same results in diffusers' transformer and PEFT's layers."""

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
    """Switch the model's blocks to the fast path, with equal outputs and gradients up to rounding.

    Parameters, their names and the state dict do not change.
    """
    for block in transformer.transformer_blocks:
        block.forward = functools.partial(fast_block.forward, block)
        _set_processors(block, FastAttention)


@contextmanager
def plain_path(transformer: SD3Transformer2DModel) -> Iterator[None]:
    """Compute bit-equal to diffusers, with its own modules, inside the context."""
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

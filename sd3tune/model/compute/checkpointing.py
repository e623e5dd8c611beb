"""Gradient checkpointing of transformer blocks: activations are recomputed instead of kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sd3tune.model.compute.kept import attend, checkpoint_but_attention

KINDS: dict[str, Callable[..., Sequence[Tensor | None]]] = {
    "block": functools.partial(checkpoint, use_reentrant=False),
    "selective": checkpoint_but_attention,
}


def checkpoint_blocks(transformer: SD3Transformer2DModel, kind: str, blocks: int | None = None) -> None:
    """Make the first `blocks` blocks (None: all) keep only their inputs for the backward pass.

    Kind `block` recomputes everything in a block; `selective` also keeps the output of attention, so attention is not
    recomputed; `none` changes nothing. Gradients are bit-equal.
    """
    if kind == "none":
        return
    chosen, recompute = set(transformer.transformer_blocks[:blocks]), KINDS[kind]

    def compute(block: nn.Module, *inputs: Any) -> Sequence[Tensor | None]:
        outputs: Sequence[Tensor | None] = recompute(block, *inputs) if block in chosen else block(*inputs)
        return outputs

    transformer.enable_gradient_checkpointing(compute)
    if kind == "selective":
        for block in chosen:
            for attention in (block.attn, block.attn2):
                if attention is not None:
                    attention.set_processor(_Attending())


def _attended(*inputs: Tensor, **options: Any) -> Tensor:
    return attend(functools.partial(F.scaled_dot_product_attention, **options), *inputs)


class _Attending(JointAttnProcessor2_0):
    """diffusers' processor as it is, except that its attention goes through `attend`. The fast path has its own."""

    __call__ = FunctionType(
        JointAttnProcessor2_0.__call__.__code__,
        JointAttnProcessor2_0.__call__.__globals__ | {"F": SimpleNamespace(scaled_dot_product_attention=_attended)},
        argdefs=JointAttnProcessor2_0.__call__.__defaults__,
    )

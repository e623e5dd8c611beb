"""Gradient checkpointing of transformer blocks: activations are recomputed instead of kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
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


class _Attending:
    """Processor that computes as diffusers' `JointAttnProcessor2_0`, with its attention through `attend`.

    The fast path has its own.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Any:
        """Return the outputs, in the inputs' shapes: [B, image tokens, width] and, if any, [B, text tokens, width]."""
        streams = [self._projected(attn, hidden_states, "to_{}", "norm_{}")]
        if encoder_hidden_states is not None:
            streams.append(self._projected(attn, encoder_hidden_states, "add_{}_proj", "norm_added_{}"))
        query, key, value = (torch.cat(of, dim=2) if len(of) > 1 else of[0] for of in zip(*streams, strict=True))
        mixed = attend(F.scaled_dot_product_attention, query, key, value).transpose(1, 2).flatten(2).to(query.dtype)
        image, text = mixed.tensor_split([hidden_states.shape[1]], dim=1)
        output = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return output
        return output, text if attn.context_pre_only else attn.to_add_out(text)

    def _projected(self, attn: Attention, states: Tensor, layer: str, norm: str) -> list[Tensor]:
        """Return query, key and value, each [B, heads, tokens, width]; `layer` and `norm` are patterns of names."""
        found = []
        for name in "qkv":
            heads = getattr(attn, layer.format(name))(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            normalise = getattr(attn, norm.format(name), None)  # values have none
            found.append(heads if normalise is None else normalise(heads))
        return found

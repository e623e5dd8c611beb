"""Fast joint attention for SD3's blocks: a processor for diffusers' `Attention`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from sd3tune.model.compute import kept
from sd3tune.model.compute.fast import cpu
from sd3tune.model.compute.fast.lora import fused_linears, linear
from sd3tune.model.compute.fast.norm import is_invertible, join, join_normalised

SHORT = 512
"""Number of tokens up to which the CPU's kernel is slower in 16 bits than in fp32, up to 12x at 16 tokens."""


class FastAttention:
    """Processor equal to `JointAttnProcessor2_0` up to rounding."""

    def __init__(self, attention: Attention) -> None:
        norms = [attention.norm_q, attention.norm_k, attention.norm_added_q, attention.norm_added_k]
        self.invertible = all(is_invertible(norm) for norm in norms if norm is not None)

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Any:
        """Return the outputs, in the inputs' shapes: [B, image tokens, width] and, if any, [B, text tokens, width]."""
        dtype = attention_dtype(hidden_states, encoder_hidden_states)
        streams = [fused_linears([attn.to_q, attn.to_k, attn.to_v], hidden_states)]
        query_norms, key_norms = [attn.norm_q], [attn.norm_k]
        if encoder_hidden_states is not None:
            layers = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
            streams.append(fused_linears(layers, encoder_hidden_states))
            query_norms.append(attn.norm_added_q)
            key_norms.append(attn.norm_added_k)
        queries, keys, values = ([_heads(attn, of, dtype) for of in parts] for parts in zip(*streams, strict=True))
        joined = (
            join_normalised(query_norms, queries, self.invertible),
            join_normalised(key_norms, keys, self.invertible),
            join(values),
        )
        mixed = attend(*(of.transpose(1, 2) for of in joined)).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return _output(attn, mixed, hidden_states.dtype)

        image_part, text_part = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        output, text_part = _output(attn, image_part, hidden_states.dtype), text_part.to(hidden_states.dtype)
        return output, text_part if attn.context_pre_only else linear(attn.to_add_out, text_part)


def attention_dtype(image: Tensor, text: Tensor | None) -> torch.dtype:
    """Return the fastest dtype for queries, keys and values [B, tokens, width]: fp32 for few tokens on the CPU."""
    tokens = image.shape[1] + (0 if text is None else text.shape[1])
    return torch.float32 if image.is_cpu and image.dtype.itemsize == 2 and tokens <= SHORT else image.dtype


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query key^T / sqrt(width)) value, all [B, heads, tokens, width]."""
    by_products = cpu.is_faster(query) and torch.is_grad_enabled()
    return kept.attend(cpu.Attention.apply if by_products else F.scaled_dot_product_attention, query, key, value)


def _heads(attn: Attention, states: Tensor, dtype: torch.dtype) -> Tensor:
    """Reshape [B, tokens, heads * width] to [B, tokens, heads, width]; a view unless the dtype changes."""
    return states.unflatten(-1, (attn.heads, -1)).to(dtype)


def _output(attn: Attention, states: Tensor, dtype: torch.dtype) -> Tensor:
    return linear(attn.to_out[0], states.to(dtype))

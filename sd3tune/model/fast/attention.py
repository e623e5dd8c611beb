"""Joint attention of SD3's blocks, the fast way: a processor that diffusers' own `Attention` calls."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F

from sd3tune.model.fast import cpu
from sd3tune.model.fast.lora import linear, linear_together
from sd3tune.model.fast.norm import normalise

SHORT = 512
"""Tokens up to which the CPU's kernel is slower in 16 bits than in fp32, up to twelve times at 16 tokens."""


class FastAttention:
    """Computes what `JointAttnProcessor2_0` does, up to rounding."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Any:
        """[B, image tokens, width], and [B, text tokens, width] where there is a text stream; the same shapes back."""
        dtype = attention_dtype(hidden_states, encoder_hidden_states)
        image = linear_together([attn.to_q, attn.to_k, attn.to_v], hidden_states)
        query, key, value = (_heads(attn, part, dtype) for part in image)
        query, key = normalise(attn.norm_q, query), normalise(attn.norm_k, key)
        if encoder_hidden_states is None:
            return _output(attn, attend(query, key, value), hidden_states.dtype)

        text = linear_together([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj], encoder_hidden_states)
        text_query, text_key, text_value = (_heads(attn, part, dtype) for part in text)
        text_query, text_key = normalise(attn.norm_added_q, text_query), normalise(attn.norm_added_k, text_key)
        mixed = attend(
            torch.cat([query, text_query], dim=2),
            torch.cat([key, text_key], dim=2),
            torch.cat([value, text_value], dim=2),
        )
        image_part, text_part = mixed.split([query.shape[2], text_query.shape[2]], dim=2)
        joined = _join(text_part).to(hidden_states.dtype)
        output = _output(attn, image_part, hidden_states.dtype)
        return output, joined if attn.context_pre_only else linear(attn.to_add_out, joined)


def attention_dtype(image: Tensor, text: Tensor | None) -> torch.dtype:
    """What queries, keys and values [B, tokens, width] are best normalised and mixed in: fp32 where that is faster."""
    tokens = image.shape[1] + (0 if text is None else text.shape[1])
    return torch.float32 if image.is_cpu and image.dtype.itemsize == 2 and tokens <= SHORT else image.dtype


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(width)) value, all [B, heads, tokens, width]."""
    if cpu.is_faster(query) and torch.is_grad_enabled():
        return cpu.Attention.apply(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def _heads(attn: Attention, states: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, tokens, heads * width] -> [B, heads, tokens, width], a view unless in another dtype."""
    return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2).to(dtype)


def _join(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(2)


def _output(attn: Attention, states: Tensor, dtype: torch.dtype) -> Tensor:
    return linear(attn.to_out[0], _join(states).to(dtype))

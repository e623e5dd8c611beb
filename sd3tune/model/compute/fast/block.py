"""Fast forward pass of SD3's transformer block: scale and shift, and gate and add, in one pass each."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import FeedForward, JointTransformerBlock
from torch import Tensor, nn

from sd3tune.model.compute.fast.lora import linear


def forward(
    block: JointTransformerBlock,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Replace `JointTransformerBlock.forward`: same arguments, and equal results up to rounding."""
    image, text, extra = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *second = _modulation(block.norm1, temb)
    text_parts = _modulation(block.norm1_context, temb)
    if block.context_pre_only:  # AdaLayerNormContinuous of diffusers puts the scale first
        text_scale, text_shift = text_parts
    else:
        text_shift, text_scale, text_gate, *text_mlp = text_parts

    normed = block.norm1.norm(image)
    attended, text_attended = block.attn(
        hidden_states=_modulated(normed, shift, scale),
        encoder_hidden_states=_modulated(block.norm1_context.norm(text), text_shift, text_scale),
        **extra,
    )
    image = torch.addcmul(image, gate, attended)
    if block.use_dual_attention:
        second_shift, second_scale, second_gate = second
        seconded = block.attn2(hidden_states=_modulated(normed, second_shift, second_scale), **extra)
        image = torch.addcmul(image, second_gate, seconded)
    image = _fed_forward(block.norm2, block.ff, image, mlp_shift, mlp_scale, mlp_gate)
    if block.context_pre_only:
        return None, image
    text = torch.addcmul(text, text_gate, text_attended)
    return _fed_forward(block.norm2_context, block.ff_context, text, *text_mlp), image


def _modulation(norm: nn.Module, temb: Tensor) -> tuple[Tensor, ...]:
    """Return shifts, scales and gates, [B, 1, width] each."""
    every = norm.linear(norm.silu(temb))  # type: ignore[operator]
    return tuple(every[:, None].split(temb.shape[-1], dim=-1))


def _modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, normed, 1 + scale)


def _fed_forward(
    norm: nn.Module, feed: FeedForward, states: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    first, dropout, last = feed.net
    wide = first.gelu(linear(first.proj, _modulated(norm(states), shift, scale)))
    return torch.addcmul(states, gate, linear(last, dropout(wide)))

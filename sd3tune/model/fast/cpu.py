"""Attention in bf16 on the CPU: torch's own kernel forward, whole matrix products of oneDNN backward.

torch's backward kernel spends more time around its products than in them. Here one head after another has its scores
recomputed by a product in bf16. Their rounding would be as large as the scores are, so each row is shifted, inside the
product, by about the score at which its weights lie: softmax does not see it, and what counts is rounded near zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_faster(query: Tensor) -> bool:
    """Whether `Attention` is worth it: bf16 on a CPU that multiplies it, as far as this version of torch can tell."""
    multiplies = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return query.is_cpu and query.dtype is torch.bfloat16 and bool(multiplies())


class Attention(torch.autograd.Function):
    """softmax(query key^T / sqrt(width)) value, all [B, heads, tokens, width] in bf16."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        ctx.save_for_backward(query, key, value, log_sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, log_sums = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        shifted = _with_column(query * scale, -_centres(query, key, log_sums, scale))
        ones = key.new_ones(*key.shape[:-1], 2)
        given = (query, key, value, gradient, shifted, torch.cat([key, ones], dim=-1))
        found = [torch.empty(of.shape, dtype=of.dtype) for of in (query, key, value)]
        weights, towards = (query.new_empty(query.shape[2], key.shape[2]) for _ in range(2))
        for head in zip(*(of.flatten(0, 1) for of in (*given, *found)), strict=True):
            q, k, v, g, shifted_q, long_k, towards_q, towards_k, towards_v = head
            torch.softmax(torch.mm(shifted_q, long_k.T, out=weights), dim=-1, out=weights)
            torch.mm(weights.T, g, out=towards_v)
            torch.mm(g, v.T, out=towards)
            torch._softmax_backward_data(towards, weights, -1, towards.dtype, grad_input=towards)
            torch.addmm(towards_q, towards, k, beta=0, alpha=scale, out=towards_q)
            torch.addmm(towards_k, towards.T, q, beta=0, alpha=scale, out=towards_k)
        return found[0], found[1], found[2]


def _centres(query: Tensor, key: Tensor, log_sums: Tensor, scale: float) -> Tensor:
    """[B, heads, tokens, 1] fp32: the mean score under each row's weights if its scores were Gaussian.

    Of mean m and variance s, n of them have the log-sum m + s / 2 + log n, and m + s under their weights.
    """
    mean = scale * (query.float() @ key.float().mean(dim=2).unsqueeze(-1))
    log_sums = log_sums.unsqueeze(-1)
    return torch.minimum(2 * (log_sums - math.log(key.shape[2])) - mean, log_sums)


def _with_column(states: Tensor, column: Tensor) -> Tensor:
    """`states` and the fp32 `column` behind, in two parts that together keep 16 bits of it."""
    high = column.to(states.dtype)
    return torch.cat([states, high, (column - high).to(states.dtype)], dim=-1)

"""RMS normalisation (Zhang and Sennrich 2019) as one operation of autograd, with its statistics in fp32."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def normalise(norm: nn.Module | None, states: Tensor) -> Tensor:
    """What `norm` makes of `states` [..., width], up to rounding; the fast way for diffusers' RMSNorm."""
    if norm is None:
        return states
    if not (isinstance(norm, RMSNorm) and norm.elementwise_affine and norm.bias is None):
        return norm(states)
    return _RmsNorm.apply(states, norm.weight.to(states.dtype), norm.eps)


class _RmsNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps) over the last dimension; exact gradients for x and, unless it is frozen, w."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        precision = torch.promote_types(states.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=precision)
        inverse = lengths.square_().div_(states.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(states, weight, inverse)
        return torch.mul(states, inverse, out=torch.empty_like(states)).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        states, weight, inverse = ctx.saved_tensors
        towards_weight = None
        if ctx.needs_input_grad[1]:
            normed = torch.mul(states, inverse, out=torch.empty_like(states))
            towards_weight = normed.mul_(gradient).sum_to_size(weight.shape)
        along = gradient * weight
        overlap = torch.linalg.vecdot(along, states).unsqueeze_(-1) * inverse**3 / -states.shape[-1]
        torch.mul(along, inverse, out=along)
        return torch.addcmul(along, states, overlap.to(along.dtype)), towards_weight, None

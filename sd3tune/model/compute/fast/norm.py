"""RMS normalisation (Zhang and Sennrich 2019) as one autograd function, with statistics in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEAST_WEIGHT = 2**-10
"""Smallest weight at which an fp16 norm's output still determines its input."""


def is_invertible(norm: nn.Module | None) -> bool:
    """Return True if no weight of `norm` is near zero, so that its output determines the direction of its input."""
    return _is_known(norm) and (norm.weight.is_meta or bool(norm.weight.cpu().abs().min() > LEAST_WEIGHT))


def join_normalised(norms: Sequence[nn.Module | None], parts: Sequence[Tensor], invertible: bool = False) -> Tensor:
    """Apply each of `norms` to its part [B, tokens, heads, width], and concatenate the results along the tokens.

    Equal to the norms up to rounding. If all are `invertible` and frozen, the backward pass keeps the result only.
    """
    known = [norm for norm in norms if _is_known(norm)]
    if len(known) == len(norms):
        weights = [norm.weight.to(part.dtype) for norm, part in zip(known, parts, strict=True)]
        keep_result = invertible and not any(weight.requires_grad for weight in weights)
        return _RmsNorms.apply([norm.eps for norm in known], keep_result, *weights, *parts)
    return join([part if norm is None else norm(part) for norm, part in zip(norms, parts, strict=True)])


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate parts [B, tokens, ...] along the tokens."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _is_known(norm: nn.Module | None) -> TypeGuard[RMSNorm]:
    return isinstance(norm, RMSNorm) and norm.elementwise_affine and norm.bias is None


class _RmsNorms(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps) over the last dimension of each part, concatenated along the tokens.

    Has gradients for x and, unless it is frozen, w.
    """

    @staticmethod
    def forward(ctx: Any, epsilons: Sequence[float], keep_result: bool, *weights_and_parts: Tensor) -> Tensor:
        weights, parts = weights_and_parts[: len(epsilons)], weights_and_parts[len(epsilons) :]
        joined = parts[0].new_empty(len(parts[0]), sum(part.shape[1] for part in parts), *parts[0].shape[2:])
        inverses, places = [], joined.split([part.shape[1] for part in parts], dim=1)
        for epsilon, weight, part, place in zip(epsilons, weights, parts, places, strict=True):
            precision = torch.promote_types(part.dtype, torch.float32)
            lengths = torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=precision)
            inverses.append(lengths.square_().div_(part.shape[-1]).add_(epsilon).rsqrt_())
            torch.mul(part, inverses[-1], out=place).mul_(weight)
        ctx.keep_result, ctx.count = keep_result, len(parts)
        ctx.save_for_backward(*weights, *inverses, *([joined] if keep_result else parts))
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, ctx.count
        weights, inverses, kept = saved[:count], saved[count : 2 * count], saved[2 * count :]
        tokens = [inverse.shape[1] for inverse in inverses]
        results = kept[0].split(tokens, dim=1) if ctx.keep_result else None
        towards_weights: list[Tensor | None] = []
        towards_parts: list[Tensor] = []
        for index, towards in enumerate(gradient.split(tokens, dim=1)):
            weight, inverse = weights[index], inverses[index]
            direction = results[index] / weight if results else kept[index].mul(inverse).to(weight.dtype)
            trained = ctx.needs_input_grad[2 + index]
            towards_weights.append((towards * direction).sum_to_size(weight.shape) if trained else None)
            along = towards * weight
            overlap = torch.linalg.vecdot(along, direction).unsqueeze_(-1) / -along.shape[-1]
            towards_parts.append(torch.addcmul(along, direction, overlap, out=along).mul_(inverse))
        return None, None, *towards_weights, *towards_parts

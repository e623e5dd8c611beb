"""LoHa and LoKr without their change of the weights, [out, in], which PEFT forms and multiplies by in every step.

A product of two low-rank matrices, elementwise, has the rank r^2: (w1a w1b) * (w2a w2b) is B A with A's rows all
products of a row of w1b and one of w2b, and B's columns likewise. A Kronecker product w1 (x) w2 acts on inputs, as a
matrix [c, d], as w1 inputs w2^T, which is [a, b].
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd3tune.model.load.quantized import dtype_of


def low_rank_of(layer: LoHaLayer, name: str) -> tuple[Tensor, Tensor] | None:
    """Return A [r^2, in] and B [out, r^2] of a LoHa, with its gradients; None if the change itself is smaller."""
    if name not in layer.hada_w1_a or name in layer.hada_t1 or _drops(layer):
        return None
    left, right = layer.hada_w1_a[name], layer.hada_w1_b[name]
    rank, outputs, inputs = len(right), len(left), right.shape[1]
    if rank**2 * (inputs + outputs) >= inputs * outputs:
        return None
    down = (right[:, None] * layer.hada_w2_b[name]).flatten(0, 1)
    up = (left[:, :, None] * layer.hada_w2_a[name][:, None]).flatten(1)
    return down, up


def called(layer: nn.Module, name: str | None, inputs: Tensor) -> Any:
    """Return `layer(inputs)`; for a LoKr whose one adapter is `name`, without the Kronecker product."""
    if not isinstance(layer, LoKrLayer) or name is None or name in layer.lokr_t2 or _drops(layer):
        return layer(inputs)
    first, second = (_matrix(layer, f"lokr_{part}", name) for part in ("w1", "w2"))
    (a, c), d = first.shape, second.shape[1]
    if a + d >= a * d or not first.dtype == second.dtype == dtype_of(layer.base_layer):
        return layer(inputs)
    change = _Kronecker.apply(inputs.reshape(-1, c, d), first, second, layer.scaling[name])
    output = layer.base_layer(inputs)
    return output + change.view(output.shape)


def _drops(layer: Any) -> bool:
    """Return True while the layer drops inputs."""
    dropout = getattr(layer, "input_dropout", None)
    return layer.training or (dropout is not None and dropout.is_drawn)


def _matrix(layer: Any, part: str, name: str) -> Any:
    if name in getattr(layer, part):
        return getattr(layer, part)[name]
    return getattr(layer, f"{part}_a")[name] @ getattr(layer, f"{part}_b")[name]


class _Kronecker(torch.autograd.Function):
    """scale (first (x) second) inputs: [N, c, d] to [N, a b]. Of the activations, only the inputs are saved."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(inputs, first, second)
        ctx.scale = scale
        return torch.einsum("ac,ncb->nab", scale * first, inputs @ second.T).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, first, second = ctx.saved_tensors
        towards = gradient.unflatten(1, (len(first), len(second)))
        narrow = torch.einsum("ac,nab->ncb", ctx.scale * first, towards)
        towards_first = torch.einsum("nab,ncb->ac", towards, inputs @ second.T).mul_(ctx.scale)
        towards_second = torch.einsum("ncb,ncd->bd", narrow, inputs)
        towards_inputs = narrow @ second if ctx.needs_input_grad[0] else None
        return towards_inputs, towards_first, towards_second, None

"""Linear layers with LoRA that share an input, such as q, k and v, in one autograd function.

PEFT computes W x + b, B (A x), the scaled product and the sum as separate tensors of the output's size, and as many in
the backward pass. Here the low-rank product accumulates into the output, and gradients accumulate into one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.loha import LoHaLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd3tune.model.compute.fast import lycoris
from sd3tune.model.load.quantized import dtype_of, is_quantized, weights_of
from sd3tune.model.lora.dropout import SeededDropout


class Adapted(NamedTuple):
    """A linear layer with LoRA: y = base(x) + scale up (down x)."""

    base: Any
    down: Tensor
    up: Tensor
    scale: float


def fused_linears(layers: Sequence[nn.Module], inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the output [..., out] of each layer for the same `inputs` [..., in], equal to calling them up to rounding.

    The fast path covers frozen linear layers, quantised or not, with one plain LoRA or LoHa each; other layers are
    called, LoKr by `lycoris.called`.
    """
    known = [adapted(layer) for layer in layers]
    if any(of is None for of in known):
        return tuple(lycoris.called(layer, _only_adapter(layer), inputs) for layer in layers)
    factors = [tensor for of in known if of for tensor in (of.down, of.up)]
    return _LoraLinears.apply(inputs, [of.base for of in known if of], [of.scale for of in known if of], *factors)


def linear(layer: nn.Module, inputs: Tensor) -> Tensor:
    return fused_linears([layer], inputs)[0]


def adapted(layer: nn.Module) -> Adapted | None:
    """Return the layer's tensors if it is a frozen linear layer with one active, plain LoRA or LoHa, else None."""
    name = _only_adapter(layer)
    if name is None:
        return None
    of: Any = layer
    pair = _factors(of, name) if isinstance(layer, LoraLayer) else None
    if isinstance(layer, LoHaLayer):
        pair = lycoris.low_rank_of(layer, name)
    if pair is None or not pair[0].dtype == pair[1].dtype == dtype_of(of.base_layer):
        return None
    return Adapted(of.base_layer, *pair, of.scaling[name])


def _only_adapter(layer: nn.Module) -> str | None:
    """Return the name of the one active adapter of a frozen linear layer, else None."""
    if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters or layer.merged:
        return None
    base, names = layer.base_layer, layer.active_adapters
    if len(names) != 1 or not (type(base) is nn.Linear or is_quantized(base)) or base.weight.requires_grad:
        return None
    return str(names[0])


def _factors(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor] | None:
    """Return A and B of a plain LoRA without dropout, else None."""
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
        return None
    if not _is_off(layer.lora_dropout[name]):
        return None
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _is_off(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Identity) or (isinstance(dropout, SeededDropout) and not dropout.is_drawn)


def _layers(bases: Sequence[Any], tensors: Sequence[Tensor], scales: Sequence[float]) -> list[Adapted]:
    """Pair each layer with its factors from the flat list, two per layer."""
    return [Adapted(*of) for of in zip(bases, tensors[::2], tensors[1::2], scales, strict=True)]


class _LoraLinears(torch.autograd.Function):
    """The layers as one function, with gradients for inputs and factors; the base weights are frozen."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, bases: Sequence[Any], scales: Sequence[float], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        rows = inputs.reshape(-1, inputs.shape[-1])
        layers = _layers(bases, factors, scales)
        narrow = rows @ torch.cat([layer.down for layer in layers]).T
        outputs = []
        for layer, part in zip(layers, narrow.split([len(layer.down) for layer in layers], dim=1), strict=True):
            wide = layer.base(rows)
            outputs.append(wide.addmm_(part, layer.up.T, alpha=layer.scale).view(*inputs.shape[:-1], -1))
        ctx.bases, ctx.scales = bases, scales
        ctx.save_for_backward(inputs, narrow, *factors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, narrow, *factors = ctx.saved_tensors
        rows = inputs.reshape(-1, inputs.shape[-1])
        layers = _layers(ctx.bases, factors, ctx.scales)
        ranks = [len(layer.down) for layer in layers]
        wides = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]

        narrow_gradient = torch.empty_like(narrow)
        for layer, wide, part in zip(layers, wides, narrow_gradient.split(ranks, dim=1), strict=True):
            torch.mm(wide, layer.up, out=part).mul_(layer.scale)
        downs = (narrow_gradient.T @ rows).split(ranks)
        ups = [
            (wide.T @ part).mul_(layer.scale)
            for layer, wide, part in zip(layers, wides, narrow.split(ranks, dim=1), strict=True)
        ]
        towards_inputs = None
        if ctx.needs_input_grad[0]:
            towards_inputs = narrow_gradient @ torch.cat([layer.down for layer in layers])
            for layer, wide in zip(layers, wides, strict=True):
                towards_inputs.addmm_(wide, weights_of(layer.base, wide.dtype))
            towards_inputs = towards_inputs.view(inputs.shape)
        per_factor = [gradient for down, up in zip(downs, ups, strict=True) for gradient in (down, up)]
        return towards_inputs, None, None, *per_factor

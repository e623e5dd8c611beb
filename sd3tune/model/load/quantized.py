"""Linear layers with weights in 4 or 8 bits, by bitsandbytes; other layers keep the model's precision.

bitsandbytes computes the products. Their backward pass is defined here, as its own for 8 bits keeps the inputs where
gradient checkpointing cannot free them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import is_modulation
from sd3tune.model.load.components import Prepare, load_text_encoder, load_transformer
from sd3tune.model.load.text import TextEncoder


def missing_library(flag: str) -> list[str]:
    """Return a line on how to install bitsandbytes, which `flag` needs; no line if it is installed."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return []
    return [f"{flag} needs bitsandbytes: pip install 'sd3tune[bitsandbytes]'"]


def load_transformer_in(
    form: str,
    base: Base,
    dtype: torch.dtype,
    device: torch.device,
    prepare: Prepare | None = None,
    store: Callable[[int, nn.Module], object] | None = None,
) -> SD3Transformer2DModel:
    """Load the transformer to `device`, with its blocks in `form`: a key of `FORMS`, or `none`.

    It is quantized layer by layer: the device never holds more than the result and one layer, the CPU the whole model.
    See `load_transformer` for `prepare`. `store` may take the weights out of each block, given with its number, before
    the next block moves to the device. The adaLN linears keep the model's precision.
    """
    if form == "none" and store is None:
        return load_transformer(base, dtype, device, prepare)
    transformer = load_transformer(base, dtype, device if device.type == "meta" else "cpu", prepare)
    for number, block in enumerate(transformer.transformer_blocks):
        if form != "none":
            quantize(transformer, block, form, device)
        if store is not None:
            store(number, block)
    nn.Module.to(transformer, device)
    return transformer


def load_text_encoder_in(
    form: str, base: Base, encoder: str, dtype: torch.dtype, device: torch.device | str, max_sequence_length: int
) -> TextEncoder:
    """Load a text encoder to `device`, with all linear layers in `form`; see `load_transformer_in`."""
    if form == "none":
        return load_text_encoder(base, encoder, dtype, device, max_sequence_length)
    found = load_text_encoder(base, encoder, dtype, "cpu", max_sequence_length)
    quantize(found.model, found.model, form, device)
    found.model.to(device)
    return found


def quantize(model: nn.Module, part: nn.Module, form: str, device: torch.device | str) -> None:
    """Replace each linear layer in `part` of `model` by one in `form` (a key of `FORMS`) on `device`, one at a time.

    `model` is on the CPU, where its other layers stay, or on the meta device. PEFT can add adapters to these layers.
    """
    from peft import import_utils

    for cached_check in (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available):
        cached_check.cache_clear()  # PEFT may have cached that bitsandbytes is missing (see `cli.imports`)
    for path, holder in list(part.named_modules()):
        for name, layer in list(holder.named_children()):
            if type(layer) is nn.Linear and not is_modulation(f"{path}.{name}"):
                quantized: Any = FORMS[form].make(layer)
                if layer.weight.is_meta:
                    quantized.weight._quantize("meta")  # bitsandbytes treats meta weights as not loaded yet
                setattr(holder, name, quantized.to(device))
    setattr(model, FORMS[form].flag, True)


def is_quantized(layer: nn.Module) -> bool:
    """Return True if `quantize` made the layer."""
    return hasattr(layer, "read_back")


def weights_of(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return a linear layer's weights [out, in]; those of a quantised layer are dequantised to `dtype`."""
    weights: Tensor = layer.read_back(dtype) if is_quantized(layer) else layer.weight
    return weights


def dtype_of(layer: Any) -> torch.dtype:
    """Return the dtype in which a linear layer computes."""
    dtype: torch.dtype = layer.compute_dtype if is_quantized(layer) else layer.weight.dtype
    return dtype


def statistics(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of quantised layers besides their parameters: scales and code books."""
    for layer in model.modules():
        if not isinstance(layer, nn.Linear):
            continue
        weight: Any = layer.weight
        if getattr(weight, "quant_state", None) is not None:
            yield from (weight.quant_state.absmax, weight.quant_state.code)
        elif hasattr(weight, "SCB"):
            yield _rows(layer)[1]


def _nf4(layer: nn.Linear) -> nn.Module:
    """Return the layer in 4-bit NormalFloat of QLoRA (Dettmers et al. 2023): blocks of 64, no double quantisation."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    quantized: Any = _frozen(Linear4bit, _from_nf4)(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    # On some CPUs the first use repacks the weights, which breaks gradients and the inputs of adapters.
    quantized.support_avx512bf16_for_cpu = False
    quantized.weight = Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4", module=quantized
    )
    return _with_bias(quantized, layer)


def _int8(layer: nn.Linear) -> nn.Module:
    """Return the layer in LLM.int8() (Dettmers et al. 2022): one scale per row, and outlier columns in 16 bits."""
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

    quantized: Any = _frozen(Linear8bitLt, _from_int8)(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
        device="meta",
    )
    quantized.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return _with_bias(quantized, layer)


def _with_bias(quantized: Any, layer: nn.Linear) -> nn.Module:
    quantized.compute_dtype = layer.weight.dtype  # PEFT takes the dtype of an adapter from it
    if layer.bias is not None:
        quantized.bias = layer.bias
    return quantized.requires_grad_(False).eval()


@functools.cache
def _frozen(kind: Any, weights: Callable[[Any, torch.dtype], Tensor]) -> Any:
    """Return a subclass of `kind`, a layer of bitsandbytes, with our backward pass; `weights` dequantises a layer."""

    class Frozen(kind):
        def forward(self, inputs: Tensor) -> Tensor:
            compute = functools.partial(_meta_product, self) if inputs.is_meta else super().forward
            if torch.is_grad_enabled() and inputs.requires_grad:
                outputs: Tensor = _Product.apply(inputs, self, compute)
                return outputs
            return compute(inputs)

        def read_back(self, dtype: torch.dtype) -> Tensor:
            return weights(self, dtype)

    return Frozen


def _meta_product(layer: Any, inputs: Tensor) -> Tensor:
    """Return the product on the meta device, where bitsandbytes has no kernels, with the same temporary memory.

    In 8 bits, inputs are rounded to fp16 and then to codes, whose product has 32 bits.
    """
    wide = (*inputs.shape[:-1], layer.out_features)
    temporaries = []
    if layer.weight.dtype is torch.int8:
        temporaries = [
            inputs.half(),
            torch.empty_like(inputs, dtype=torch.int8),
            inputs.new_empty(wide, dtype=torch.int32),
        ]
    outputs = nn.functional.linear(inputs, layer.read_back(inputs.dtype), layer.bias)
    del temporaries
    return outputs


class _Product(torch.autograd.Function):
    """`compute(inputs)`, with a gradient through the dequantised weights; no tensor is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Any, compute: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.layer = layer
        return compute(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.layer.read_back(gradient.dtype), None, None


def _from_nf4(layer: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weights: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weights.to(dtype)


def _from_int8(layer: Any, dtype: torch.dtype) -> Tensor:
    codes, scales = _rows(layer)
    return codes.to(dtype).mul_(scales[:, None] * (1 / 127))


def _rows(layer: Any) -> tuple[Tensor, Tensor]:
    """Return codes [out, in] and row maxima [out], which bitsandbytes moves to `state` at a layer's first use."""
    owner = layer.weight if layer.state.CB is None else layer.state
    return owner.CB, owner.SCB


class Form(NamedTuple):
    """A storage format of weights."""

    flag: str
    """The attribute by which PEFT recognizes such a model."""
    make: Callable[[nn.Linear], nn.Module]


FORMS = {"nf4": Form("is_loaded_in_4bit", _nf4), "int8": Form("is_loaded_in_8bit", _int8)}

"""Linear layers whose weights are kept in 4 or 8 bits, by bitsandbytes; the rest keeps the model's precision.

bitsandbytes computes the products. How gradients pass them is said here, as its own way for 8 bits holds on to the
inputs, out of reach of gradient checkpointing.
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
    """A line with the way to get bitsandbytes, which `flag` asks for; none where it is installed."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return []
    return [f"{flag} needs bitsandbytes: pip install 'sd3tune[bitsandbytes]'"]


def load_transformer_in(
    form: str, base: Base, dtype: torch.dtype, device: torch.device, prepare: Prepare | None = None
) -> SD3Transformer2DModel:
    """The transformer on `device`, its blocks in `form`: a key of `FORMS`, or `none`.

    Layer by layer, so that the device never holds more than the result and one layer; the CPU holds all of it.
    `prepare` is as in `load_transformer`. The adaLN linears keep the model's precision.
    """
    if form == "none":
        return load_transformer(base, dtype, device, prepare)
    transformer = load_transformer(base, dtype, device if device.type == "meta" else "cpu", prepare)
    quantize(transformer, transformer.transformer_blocks, form, device)
    nn.Module.to(transformer, device)
    return transformer


def load_text_encoder_in(
    form: str, base: Base, encoder: str, dtype: torch.dtype, device: torch.device | str, max_sequence_length: int
) -> TextEncoder:
    """One text encoder on `device`, all its linear layers in `form`, as `load_transformer_in` has it."""
    if form == "none":
        return load_text_encoder(base, encoder, dtype, device, max_sequence_length)
    found = load_text_encoder(base, encoder, dtype, "cpu", max_sequence_length)
    quantize(found.model, found.model, form, device)
    found.model.to(device)
    return found


def quantize(model: nn.Module, part: nn.Module, form: str, device: torch.device | str) -> None:
    """Replace each linear layer in `part` of `model` by one of `form` (a key of `FORMS`) on `device`, one at a time.

    `model` is on the CPU, and the rest of it stays there; or all is on the meta device. PEFT puts adapters on top of
    such layers.
    """
    from peft import import_utils

    for asked in (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available):
        asked.cache_clear()  # peft may remember that there is no bitsandbytes (see `cli.imports`)
    for path, holder in list(part.named_modules()):
        for name, layer in list(holder.named_children()):
            if type(layer) is nn.Linear and not is_modulation(f"{path}.{name}"):
                made: Any = FORMS[form].make(layer)
                if layer.weight.is_meta:
                    made.weight._quantize("meta")  # bitsandbytes treats meta weights as not loaded yet
                setattr(holder, name, made.to(device))
    setattr(model, FORMS[form].flag, True)


def is_quantized(layer: nn.Module) -> bool:
    """Return whether `quantize` made the layer."""
    return hasattr(layer, "read_back")


def weights_of(layer: Any, dtype: torch.dtype) -> Tensor:
    """A linear layer's weights [out, in] as it computes with them; of a quantised one, read back in `dtype`."""
    found: Tensor = layer.read_back(dtype) if is_quantized(layer) else layer.weight
    return found


def dtype_of(layer: Any) -> torch.dtype:
    """Return the dtype in which a linear layer computes."""
    found: torch.dtype = layer.compute_dtype if is_quantized(layer) else layer.weight.dtype
    return found


def statistics(model: nn.Module) -> Iterator[Tensor]:
    """What quantised layers hold besides their parameters: scales, and the values that codes stand for."""
    for layer in model.modules():
        if not isinstance(layer, nn.Linear):
            continue
        weight: Any = layer.weight
        if getattr(weight, "quant_state", None) is not None:
            yield from (weight.quant_state.absmax, weight.quant_state.code)
        elif hasattr(weight, "SCB"):
            yield _rows(layer)[1]


def _nf4(layer: nn.Linear) -> nn.Module:
    """4-bit NormalFloat in blocks of 64, as QLoRA (Dettmers et al. 2023) has it, without its second quantisation."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    made: Any = _frozen(Linear4bit, _from_nf4)(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    # Repacked for some CPUs at their first use, weights would pass no gradient, and give an adapter wrong inputs.
    made.support_avx512bf16_for_cpu = False
    made.weight = Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4", module=made
    )
    return _with_bias(made, layer)


def _int8(layer: nn.Linear) -> nn.Module:
    """LLM.int8() of Dettmers et al. 2022: a scale a row, and columns with outliers apart, in 16 bits."""
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

    made: Any = _frozen(Linear8bitLt, _from_int8)(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
        device="meta",
    )
    made.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return _with_bias(made, layer)


def _with_bias(made: Any, layer: nn.Linear) -> nn.Module:
    made.compute_dtype = layer.weight.dtype  # by which PEFT knows what an adapter on top is to be in
    if layer.bias is not None:
        made.bias = layer.bias
    return made.requires_grad_(False).eval()


@functools.cache
def _frozen(kind: Any, weights: Callable[[Any, torch.dtype], Tensor]) -> Any:
    """Layers of that `kind` of bitsandbytes; `weights` are a layer's, read back."""

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
    """For the meta device, where bitsandbytes has no kernels: the shapes of a product with the weights read back.

    In 8 bits, inputs are rounded to fp16 and then to codes, whose product has 32.
    """
    wide = (*inputs.shape[:-1], layer.out_features)
    taken = []
    if layer.weight.dtype is torch.int8:
        taken = [inputs.half(), torch.empty_like(inputs, dtype=torch.int8), inputs.new_empty(wide, dtype=torch.int32)]
    outputs = nn.functional.linear(inputs, layer.read_back(inputs.dtype), layer.bias)
    del taken
    return outputs


class _Product(torch.autograd.Function):
    """What `compute` makes of `inputs`; the gradient passes the weights as they are held, and nothing else is kept."""

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

    found: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found.to(dtype)


def _from_int8(layer: Any, dtype: torch.dtype) -> Tensor:
    codes, scales = _rows(layer)
    return codes.to(dtype).mul_(scales[:, None] * (1 / 127))


def _rows(layer: Any) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and the largest of each row [out]: bitsandbytes moves them at a layer's first use."""
    held = layer.weight if layer.state.CB is None else layer.state
    return held.CB, held.SCB


class Form(NamedTuple):
    """A way to hold weights."""

    flag: str
    """The attribute by which PEFT knows such a model."""
    make: Callable[[nn.Linear], nn.Module]


FORMS = {"nf4": Form("is_loaded_in_4bit", _nf4), "int8": Form("is_loaded_in_8bit", _int8)}

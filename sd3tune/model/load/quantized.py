"""Linear layers with weights in 4 or 8 bits; other layers keep the model's precision.

bitsandbytes computes the 4-bit products. The 8-bit products are torch's, with dequantised weights: bitsandbytes would
search the activations for outliers, and wait for the device in each layer.
"""

from __future__ import annotations

import functools
import importlib.util
import math
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

_ROWS = 256
"""Rows that are quantised to 8 bits at a time, so that the work takes little memory."""


def missing_library(flag: str, form: str) -> list[str]:
    """Return a line on how to install the package that `form` needs, as set by `flag`; no line if none is missing."""
    package = FORMS[form].package
    if package is None or importlib.util.find_spec(package) is not None:
        return []
    return [f"{flag} needs {package}: pip install 'sd3tune[{package}]'"]


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
    A layer that the model's class keeps in fp32 beside fp16 computes in fp32: T5's `wo` overflows in fp16.
    """
    from peft import import_utils

    wide = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}

    for cached_check in (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available):
        cached_check.cache_clear()  # PEFT may have cached that bitsandbytes is missing (see `cli.imports`)
    paths = [path for path, layer in part.named_modules() if type(layer) is nn.Linear and not is_modulation(path)]
    for path in paths:  # no list of layers, which would keep all of them on the device
        layer: Any = part.get_submodule(path).to(device)
        quantized: Any = FORMS[form].make(layer).to(device)
        parent, _, name = path.rpartition(".")
        quantized.computes_wide = name in wide and layer.weight.dtype is torch.float32
        setattr(part.get_submodule(parent), name, quantized)
    for flag in FORMS[form].flags:
        setattr(model, flag, True)


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
    """Yield the tensors of quantised layers besides parameters and buffers: scales and code books."""
    for layer in model.modules():
        state = getattr(layer.weight, "quant_state", None) if isinstance(layer, nn.Linear) else None
        if state is not None:
            yield from (state.absmax, state.code)


def _nf4(layer: nn.Linear) -> nn.Module:
    """Return the layer in 4-bit NormalFloat of QLoRA (Dettmers et al. 2023): blocks of 64, no double quantisation."""
    from bitsandbytes.nn.modules import Params4bit

    quantized: Any = _frozen_4bit()(
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
    if layer.weight.is_meta:
        quantized.weight._quantize("meta")  # bitsandbytes treats meta weights as not loaded yet
    return _with_bias(quantized, layer)


class Int8Linear(nn.Linear):
    """A frozen linear layer in 8 bits: row r of its weights is `weight[r]` (int8) times `scale[r]` (fp32).

    Only weights are rounded. Each product dequantises them; none waits for the device.
    """

    scale: Tensor
    computes_wide = False
    """True to compute in fp32, and return fp32, whatever the inputs' dtype."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.detach()
        largest = torch.linalg.vector_norm(weight, math.inf, dim=1, keepdim=True, dtype=torch.float32)
        scale = (largest / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        parts = zip(weight.split(_ROWS), scale.split(_ROWS), strict=True)
        codes = torch.cat([(rows / of).round_().to(torch.int8) for rows, of in parts])
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        _with_bias(self, layer)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.float() if self.computes_wide else inputs
        if torch.is_grad_enabled() and inputs.requires_grad:
            outputs: Tensor = _Product.apply(inputs, self, self._multiply)
            return outputs
        return self._multiply(inputs)

    def _multiply(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.read_back(inputs.dtype), self.bias)

    def read_back(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype).mul_(self.scale)

    @property
    def W_q(self) -> Tensor:
        """The stored weights. By this name PEFT knows that DoRA has to call `dequantize`; else it takes the codes."""
        return self.weight

    def dequantize(self) -> Tensor:
        dtype: torch.dtype = self.compute_dtype  # type: ignore[assignment]
        return self.read_back(dtype)


def _with_bias(quantized: Any, layer: nn.Linear) -> nn.Module:
    quantized.compute_dtype = layer.weight.dtype  # PEFT takes the dtype of an adapter from it
    if layer.bias is not None:
        quantized.bias = layer.bias
    return quantized.requires_grad_(False).eval()


@functools.cache
def _frozen_4bit() -> Any:
    """Return a subclass of bitsandbytes' 4-bit layer with our backward pass."""
    from bitsandbytes.nn.modules import Linear4bit

    kind: Any = Linear4bit

    class Frozen(kind):
        def forward(self, inputs: Tensor) -> Tensor:
            compute = functools.partial(_meta_product, self) if inputs.is_meta else super().forward
            if torch.is_grad_enabled() and inputs.requires_grad:
                outputs: Tensor = _Product.apply(inputs, self, compute)
                return outputs
            return compute(inputs)

        def read_back(self, dtype: torch.dtype) -> Tensor:
            from bitsandbytes.functional import dequantize_4bit

            weights: Tensor = dequantize_4bit(self.weight.data, self.weight.quant_state)
            return weights.to(dtype)

    return Frozen


def _meta_product(layer: Any, inputs: Tensor) -> Tensor:
    """Return the product on the meta device, where bitsandbytes has no kernels."""
    return nn.functional.linear(inputs, layer.read_back(inputs.dtype), layer.bias)


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


class Form(NamedTuple):
    """A storage format of weights."""

    make: Callable[[nn.Linear], nn.Module]
    package: str | None = None
    """Optional package that it needs; the extra to install has the same name."""
    flags: tuple[str, ...] = ()
    """The attributes by which PEFT recognizes such a model."""


FORMS = {"nf4": Form(_nf4, "bitsandbytes", ("is_loaded_in_4bit",)), "int8": Form(Int8Linear)}

"""Linear layers whose weights are kept in 4 or 8 bits, by bitsandbytes; the rest keeps the model's precision."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def missing_library(flag: str) -> list[str]:
    """A line with the way to get bitsandbytes, which `flag` asks for; none where it is installed."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return []
    return [f"{flag} needs bitsandbytes: pip install 'sd3tune[bitsandbytes]'"]


def quantize(model: nn.Module, part: nn.Module, form: str, device: torch.device | str) -> None:
    """Replace each linear layer in `part` of `model` by one of `form` (a key of `FORMS`) on `device`, one at a time.

    `model` is on the CPU; the rest of it stays there. PEFT puts adapters on top of such layers.
    """
    from peft import import_utils

    flag, make = FORMS[form]
    for asked in (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available):
        asked.cache_clear()  # peft may remember that there is no bitsandbytes (see `cli.imports`)
    for holder in list(part.modules()):
        for name, layer in list(holder.named_children()):
            if type(layer) is nn.Linear:
                setattr(holder, name, make(layer).to(device))
    setattr(model, flag, True)


def _nf4(layer: nn.Linear) -> nn.Module:
    """4-bit NormalFloat in blocks of 64, as QLoRA (Dettmers et al. 2023) has it, without its second quantisation."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    made: Any = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    made.weight = Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4", module=made
    )
    return _with_bias(made, layer)


def _int8(layer: nn.Linear) -> nn.Module:
    """LLM.int8() of Dettmers et al. 2022: a scale a row, and columns with outliers apart, in 16 bits."""
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

    made: Any = Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
        device="meta",
    )
    made.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return _with_bias(made, layer)


def _with_bias(made: nn.Module, layer: nn.Linear) -> nn.Module:
    if layer.bias is not None:
        made.bias = layer.bias
    return made.requires_grad_(False).eval()


FORMS: dict[str, tuple[str, Callable[[nn.Linear], nn.Module]]] = {
    "nf4": ("is_loaded_in_4bit", _nf4),
    "int8": ("is_loaded_in_8bit", _int8),
}
"""Form -> the attribute by which PEFT knows such a model, and what makes the layer."""

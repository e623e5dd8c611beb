"""PEFT's layers of LoHa and LoKr, filled with the tensors of a file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig
from torch import Tensor, nn

from sd3tune.adapter.lycoris import Parts, kind_of
from sd3tune.model.load.quantized import weights_of


def base_weights(transformer: nn.Module, module: str) -> Tensor:
    """Return the base's weights [out, in] of a module in fp32, below any adapters."""
    layer: Any = transformer.get_submodule(module)
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return weights_of(layer, torch.float32)


def dense(update: Tensor) -> dict[str, Tensor]:
    """Return any update [out, in] as a LoKr, whose small matrix is 1."""
    return {"lokr_w1": torch.ones(1, 1), "lokr_w2": update}


@contextmanager
def several_adapters() -> Iterator[None]:
    """Silence PEFT's warning of a second adapter, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield


def attach_parts(transformer: Any, modules: Mapping[str, Parts], name: str) -> None:
    """Add LoHa or LoKr layers under `name`, with these parts of each module in the model's dtype.

    PEFT would choose the parts' shapes by its own rule, and other tools choose others; so its parts are replaced.
    """
    kind: type[Any] = LoHaConfig if kind_of(next(iter(modules.values()))) == "loha" else LoKrConfig
    with several_adapters(), torch.random.fork_rng(devices=[]):  # PEFT draws initial values
        transformer.add_adapter(kind(r=1, alpha=1, target_modules=list(modules)), adapter_name=name)
    for module, parts in modules.items():
        layer: Any = transformer.get_submodule(module)
        layer.training = False  # else PEFT draws in each step whether to leave the layer out, at a share of 0
        place = next(getattr(layer, part)[name] for part in layer.adapter_layer_names if name in getattr(layer, part))
        for part in layer.adapter_layer_names:
            if name in getattr(layer, part):
                del getattr(layer, part)[name]
        for part, tensor in parts.items():
            value = tensor.to(place.device, transformer.dtype, copy=True)
            getattr(layer, part)[name] = nn.Parameter(value, requires_grad=False)

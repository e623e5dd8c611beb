"""An adapter's part for the text encoders: matched to a base, and attached to a loaded encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from sd3tune.adapter.attach import match
from sd3tune.adapter.file import Adapter
from sd3tune.adapter.peft_config import peft_arguments
from sd3tune.adapter.rearrange import first_of
from sd3tune.errors import AdapterError
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_OF, ENCODER_PARTS
from sd3tune.model.load.components import text_encoder_shape
from sd3tune.model.lora.layers import lora_layers


def match_text(base: Base, adapter: Adapter) -> None:
    """Raise AdapterError if the adapter's text encoders have other modules or sizes than the base's."""
    for part in adapter.text_parts:
        of_part = adapter.of_part(part)
        unmatched = match(text_encoder_shape(base, ENCODER_OF[part], torch.float32), of_part).unmatched
        if unmatched:
            raise AdapterError(f"{adapter.path}: {base.name} has no {part}.{first_of(unmatched)}")


def attach_text(encoder: str, model: Any, adapter: Adapter, name: str) -> int:
    """Add the adapter's part for `encoder` to its `model` under `name`, in its dtype. Return the number of tensors.

    It is off until `use_adapters` names it. Raises AdapterError for weights beyond the dtype's range.
    """
    of_part = adapter.of_part(ENCODER_PARTS[encoder][1])
    if not of_part.factors:
        return 0
    model.add_adapter(LoraConfig(**peft_arguments(of_part.factors, of_part.alphas)), adapter_name=name)
    layers: Mapping[str, Any] = lora_layers(model)
    for module, pair in of_part.factors.items():
        layer = layers[module]
        for weight, factor in zip((layer.lora_A[name].weight, layer.lora_B[name].weight), pair, strict=True):
            weight.data = factor.to(weight.device, model.dtype)
            if not weight.isfinite().all():
                dtype = str(model.dtype).removeprefix("torch.")
                raise AdapterError(
                    f"{adapter.path}: {module} is beyond what {dtype} holds; take a wider one, such as --dtype bf16"
                )
    return 2 * len(of_part.factors)


def use_adapters(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Use the attached adapters that `weights` names, with these weights, and no others."""
    for layer in lora_layers(model).values():
        layer.set_adapter([name for name in weights if name in layer.lora_A])
        for name, weight in weights.items():
            layer.set_scale(name, weight)

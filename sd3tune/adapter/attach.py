"""Adapters in a transformer: match their modules, and load them into PEFT's layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sd3tune.adapter.dora import magnitude_for
from sd3tune.adapter.file import Adapter
from sd3tune.adapter.kinds import change_of, update_of
from sd3tune.adapter.layouts import MAGNITUDE
from sd3tune.adapter.lycoris import Parts
from sd3tune.adapter.lycoris_layers import attach_parts, base_weights, dense, several_adapters
from sd3tune.adapter.metadata import PREFIX
from sd3tune.adapter.peft_config import peft_arguments
from sd3tune.adapter.rearrange import as_stored, first_of
from sd3tune.errors import AdapterError


@dataclass(frozen=True)
class Match:
    """The result of matching an adapter to a model: the number of matched tensors, and the unmatched modules."""

    matched: int
    unmatched: tuple[str, ...]


def match(transformer: nn.Module, adapter: Adapter) -> Match:
    """Match the adapter's tensors to modules of `transformer` by name and shape, before anything is loaded.

    Raises AdapterError if a shape differs, or if nothing matches, so that the file would load without effect.
    """
    sizes = {
        re.sub(r"(\.base_layer)+$", "", name): _size(module)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    of_adapter = adapter.sizes
    unmatched = tuple(name for name in of_adapter if name not in sizes)
    for name, found in of_adapter.items():
        needed = sizes.get(name)
        if needed is not None and found != needed:
            raise AdapterError(
                f"{adapter.path}: made for another base: {name} is {found[0]}x{found[1]} in the adapter and "
                f"{needed[0]}x{needed[1]} in the model; give the right one with --base"
            )
    if len(unmatched) == len(of_adapter):
        raise AdapterError(
            f"{adapter.path}: none of its {len(unmatched)} modules exists in this model, so it would have no effect "
            f"(first: {unmatched[0]})"
        )
    tensors = {name: 2 + (name in adapter.magnitudes) for name in adapter.factors}
    tensors |= {name: len(parts) + (name in adapter.magnitudes) for name, parts in adapter.lycoris.items()}
    return Match(sum(count for name, count in tensors.items() if name not in unmatched), unmatched)


def _size(module: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Return (outputs, inputs); for a convolution, the inputs of one position."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels * math.prod(module.kernel_size)


def attach(transformer: Any, adapter: Adapter, name: str) -> Match:
    """Load `adapter` into `transformer` under `name`, in the model's dtype, and count the matched tensors.

    `transformer` is an SD3Transformer2DModel; its active adapters are set by the caller (`set_adapters`).
    """
    counted = match(transformer, adapter)
    parts = _as_parts(transformer, adapter, counted.unmatched)
    if parts:
        every = {f"{module}.{part}": tensor for module, of in parts.items() for part, tensor in of.items()}
        _check_range(transformer, adapter, every)
        attach_parts(transformer, parts, name)
        return counted
    loaded = {module: pair for module, pair in adapter.factors.items() if module not in counted.unmatched}
    tensors = {
        f"{PREFIX}{module}.lora_{letter}.weight": tensor.to(transformer.dtype)
        for module, pair in loaded.items()
        for letter, tensor in zip("AB", as_stored(module, pair), strict=True)
    }
    if adapter.magnitudes:
        magnitudes = _magnitudes(transformer, adapter, loaded)
        tensors |= {f"{PREFIX}{module}.{MAGNITUDE}": one.to(transformer.dtype) for module, one in magnitudes.items()}
    _check_range(transformer, adapter, tensors)
    config = {**peft_arguments(loaded, adapter.alphas), "use_dora": bool(adapter.magnitudes)}
    with several_adapters():
        transformer.load_lora_adapter(
            tensors, adapter_name=name, metadata={PREFIX + key: value for key, value in config.items()}
        )
    carried = sum(name in getattr(module, "lora_A", {}) for module in transformer.modules())
    if carried != len(loaded):
        raise AdapterError(f"{adapter.path}: {carried} of {len(loaded)} modules took their weights")
    return counted


def _check_range(transformer: Any, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterError for a tensor that is infinite in the model's dtype."""
    lost = [key for key, tensor in tensors.items() if not tensor.to(transformer.dtype).isfinite().all()]
    if lost:
        dtype = str(transformer.dtype).removeprefix("torch.")
        raise AdapterError(
            f"{adapter.path}: {first_of(lost)} is beyond what {dtype} holds; take a wider one, such as --dtype bf16"
        )


def _as_parts(transformer: Any, adapter: Adapter, unmatched: Sequence[str]) -> dict[str, Parts]:
    """Return module -> parts of LoHa or LoKr; empty if PEFT's LoRA layers compute the adapter.

    They cannot compute DoRA with one magnitude per input, or on LoHa or LoKr. Its whole change becomes a dense LoKr.
    """
    if adapter.by_lora_layers or not adapter.magnitudes:
        return {module: parts for module, parts in adapter.lycoris.items() if module not in unmatched}
    return {
        module: dense(change_of(adapter, module, base_weights(transformer, module)).float())
        for module in adapter.sizes
        if module not in unmatched
    }


def _magnitudes(transformer: Any, adapter: Adapter, modules: Iterable[str]) -> dict[str, Tensor]:
    """Return module -> DoRA's magnitude [out] for PEFT; for a module without one, it changes nothing."""
    found = {}
    for module in modules:
        if module in adapter.magnitudes and not adapter.of_base:
            found[module] = adapter.magnitudes[module]
            continue
        weight = base_weights(transformer, module).cpu().double()  # a Mac's GPU has no float64
        magnitude = adapter.magnitudes.get(module, weight.norm(dim=1)).to(weight)
        found[module] = magnitude_for(weight, update_of(adapter, module).to(weight), magnitude, of_base=True)
    return found

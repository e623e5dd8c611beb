"""Facts of an adapter that depend on its base's weights: DoRA's magnitudes and changes."""

from __future__ import annotations

import torch
from torch import Tensor

from sd3tune.adapter.dora import magnitude_for, per_output
from sd3tune.adapter.file import Adapter
from sd3tune.adapter.kinds import change_of, update_of
from sd3tune.adapter.layouts import MAGNITUDE, forms
from sd3tune.adapter.low_rank import Truncated, approximated
from sd3tune.adapter.original import fused_parts
from sd3tune.errors import AdapterError
from sd3tune.inference.conditions import find_base
from sd3tune.model.load.components import load_transformer
from sd3tune.reporting import progress_bar


def nearest_lora(adapter: Adapter, rank: int, base: str | None) -> dict[str, Truncated]:
    """Return module -> the nearest LoRA of `rank` to the adapter's change of its weight.

    `base` (None: the base that the adapter names) is loaded for DoRA only.
    """
    weights = _weights(adapter, base) if adapter.magnitudes else {}
    found = {}
    with progress_bar(total=len(adapter.sizes), desc="approximating", unit="module") as bar:
        for module, (outputs, inputs) in adapter.sizes.items():
            weight = weights.get(f"{module}.weight", torch.empty(outputs, inputs, device="meta"))
            found[module] = approximated(change_of(adapter, module, weight), rank)
            bar.update()
    return found


def magnitudes_for(adapter: Adapter, form: str, base: str | None) -> dict[str, Tensor]:
    """Return DoRA's magnitudes [out] as a form's readers use them, with those of all parts of fused modules.

    PEFT divides by the norm of the updated weights, ComfyUI by that of the base's. The base is loaded where both are
    involved. Raises AdapterError for one magnitude per input, or for LoHa and LoKr.
    """
    if adapter.lycoris or not all(per_output(one) for one in adapter.magnitudes.values()):
        raise AdapterError(
            f"{adapter.path}: no form expresses its magnitudes, which are of {adapter.kind}, or one per input; write a "
            "LoRA with --rank R, or merge it into its base (`sd3tune lora merge --into-base`)"
        )
    layout = forms()[form]
    of_base = layout.magnitude != MAGNITUDE
    if of_base == adapter.of_base and not layout.original and len(adapter.magnitudes) == len(adapter.factors):
        return dict(adapter.magnitudes)
    weights = _weights(adapter, base)
    found = {}
    for module in fused_parts(adapter.factors) if layout.original else adapter.factors:
        weight = weights[f"{module}.weight"].double()
        update = update_of(adapter, module) if module in adapter.factors else torch.zeros_like(weight)
        neutral = (weight if adapter.of_base else weight + update).norm(dim=1)
        magnitude = adapter.magnitudes.get(module, neutral).double()
        same = of_base == adapter.of_base
        found[module] = magnitude if same else magnitude_for(weight, update, magnitude, of_base=adapter.of_base)
    return found


def _weights(adapter: Adapter, base: str | None) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_transformer(find_base(base, [adapter]), torch.float32).state_dict()
    return weights

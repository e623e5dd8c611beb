"""The change of a base's weights by an adapter of any kind."""

from __future__ import annotations

from torch import Tensor

from sd3tune.adapter.dora import decomposed
from sd3tune.adapter.file import Adapter
from sd3tune.adapter.lycoris import product
from sd3tune.errors import AdapterError


def update_of(adapter: Adapter, module: str) -> Tensor:
    """Return the update [out, in] of a module in float64, with its scale and without DoRA's magnitude."""
    if module in adapter.lycoris:
        return product({part: tensor.double() for part, tensor in adapter.lycoris[module].items()})
    down, up = (factor.double() for factor in adapter.factors[module])
    return adapter.alphas[module] / len(down) * up @ down


def change_of(adapter: Adapter, module: str, weight: Tensor) -> Tensor:
    """Return the change [out, in] of a module's weight in float64; only DoRA's depends on the weight."""
    update = update_of(adapter, module)
    if module not in adapter.magnitudes:
        return update
    weight = weight.to(update)
    return decomposed(weight, update, adapter.magnitudes[module].to(update), adapter.of_base) - weight


def require_lora(adapter: Adapter, doing: str) -> None:
    """Raise AdapterError unless the adapter is a plain LoRA."""
    if adapter.kind != "LoRA":
        raise AdapterError(
            f"{adapter.path}: is a {adapter.kind}, and {doing} takes LoRA only; "
            "`sd3tune lora convert --rank R` approximates it by a LoRA"
        )

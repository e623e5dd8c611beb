"""Adapters added to the weights of their base: each weight is summed in float64, so that it is rounded once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from sd3tune.adapter.file import Adapter
from sd3tune.adapter.kinds import change_of
from sd3tune.adapter.rearrange import first_of
from sd3tune.adapter.text_encoders import match_text
from sd3tune.errors import AdapterError, ModelError
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_OF, LABELS
from sd3tune.model.base.weights import weight_files

Weighted = Sequence[tuple[Adapter, float]]
"""Adapters with their weights."""


def added(weight: Tensor, module: str, adapters: Weighted) -> Tensor:
    """Return a module's merged weight, fp32."""
    total = base = weight.double()
    for adapter, share in adapters:
        if adapter.kind != "LoRA" and module in adapter.sizes:
            total = total + share * change_of(adapter, module, base)
        elif module in adapter.factors:
            down, up = (factor.double() for factor in adapter.factors[module])
            change = share * adapter.alphas[module] / len(down) * up @ down
            total = total + change.reshape(total.shape)
    return total.float()


def check_text(base: Base, adapters: Weighted, encoders: Collection[str]) -> None:
    """Raise AdapterError for an adapter of a text encoder that `encoders` leave out, or that is another one."""
    for adapter, _ in adapters:
        left_out = [ENCODER_OF[part] for part in adapter.text_parts if ENCODER_OF[part] not in encoders]
        if left_out:
            raise AdapterError(
                f"{adapter.path}: also adapts {LABELS[left_out[0]]}, which the model is written without; leave the "
                "text encoders out: --transformer-only"
            )
        match_text(base, adapter)


def merged_text(base: Base, adapters: Weighted) -> dict[str, dict[str, Tensor]]:
    """Return folder of each adapted text encoder -> key in its files -> merged weight, in its stored dtype."""
    merged = {}
    for part in dict.fromkeys(part for adapter, _ in adapters for part in adapter.text_parts):
        own = [(adapter.of_part(part), share) for adapter, share in adapters]
        modules = list(dict.fromkeys(module for adapter, _ in own for module in adapter.factors))
        stored = _stored(base.folder(part), [f"{module}.weight" for module in modules])
        merged[part] = {
            name: added(weight, name.removesuffix(".weight"), own).to(weight.dtype) for name, weight in stored.items()
        }
    return merged


def _stored(folder: Path, names: Sequence[str]) -> Mapping[str, Tensor]:
    """Return weights of a part from its files, in their order in `names`. Raises ModelError for a missing one."""
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys() if name in names}  # noqa: SIM118
    missing = [name for name in names if name not in found]
    if missing:
        raise ModelError(f"{folder}: its files have no {first_of(missing)}, so no adapter can be merged into them")
    return {name: found[name] for name in names}

"""`sd3tune lora extract`: the difference of two models as a LoRA, and its error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune import __version__
from sd3tune.adapter.derived import by_block, check_out, losses, write_form
from sd3tune.adapter.layouts import PATCH_EMBEDDER, forms
from sd3tune.adapter.low_rank import Truncated, approximated
from sd3tune.adapter.rearrange import first_of
from sd3tune.errors import ConfigError, ModelError, RunError
from sd3tune.inference.conditions import find_base
from sd3tune.model.base.base import Base
from sd3tune.model.base.contract import CONTRACT_KEYS, declared
from sd3tune.model.base.parts import ENCODERS
from sd3tune.model.load.components import empty_transformer, load_transformer, stored_dtype
from sd3tune.reporting import progress_bar
from sd3tune.runtime.device import make_accelerator


def extract_lora(base: str, tuned: str, rank: int, out: Path, form: str) -> list[str]:
    """Write the nearest LoRA of `rank` to `tuned` - `base`, two models' transformers, to `out`; return summary lines.

    Raises ConfigError, ModelError for models of different shapes or equal weights, and RunError when `out` exists.
    """
    if rank < 1:
        raise ConfigError(f"--rank {rank}: at least 1")
    if form not in forms():
        raise RunError(f"--to {form}: one of {', '.join(forms())}")
    check_out(out)
    first, second = find_base(base, []), find_base(tuned, [])
    _check_shapes(first, second)
    before, after = (load_transformer(one, stored_dtype(one)).state_dict() for one in (first, second))
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name].to(tensor.dtype))]
    modules = [name.removesuffix(".weight") for name in changed if _is_linear(name, before[name])]
    if not modules:
        raise ModelError(f"{second.name}: its linear layers are those of {first.name}: there is nothing to extract")
    device = make_accelerator().device
    found: dict[str, Truncated] = {}
    with progress_bar(modules, desc="extracting", unit="module") as bar:
        for module in bar:
            tensors = (
                one[f"{module}.weight"].to(device if device.type == "cuda" else "cpu") for one in (after, before)
            )
            new, old = (tensor.double().flatten(1) for tensor in tensors)
            found[module] = approximated(new - old, rank)
    factors = {module: one.pair for module, one in found.items()}
    write_form(out, form, factors, _contract(first, second, rank), {})
    left = [name for name in changed if name.removesuffix(".weight") not in found]
    return [
        f"{out}: {len(factors)} modules of rank {rank}: {second.name} - {first.name}",
        *losses(found),
        *by_block(found),
        *_left_out(left, before, after),
    ]


def _check_shapes(first: Base, second: Base) -> None:
    """Raise ModelError for the first difference of the transformers' tensors in name or shape."""
    shapes, others = ({name: [*tensor.shape] for name, tensor in empty_transformer(one).state_dict().items()}
                      for one in (first, second))  # fmt: skip
    for name in dict.fromkeys([*shapes, *others]):
        one, other = shapes.get(name), others.get(name)
        if one != other:
            sizes = f"{one or 'missing'} in {first.name} and {other or 'missing'} in {second.name}"
            raise ModelError(f"{second.name}: it was not tuned from {first.name}: {name} is {sizes}")


def _is_linear(name: str, tensor: Tensor) -> bool:
    """Return True for the weight of a linear layer, or of the patch embedder, which is one on patches."""
    return name == f"{PATCH_EMBEDDER}.weight" or (name.endswith(".weight") and tensor.ndim == 2)


def _left_out(names: list[str], before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Return a line about the changed tensors that a LoRA cannot hold: biases and norms."""
    if not names:
        return []
    change = sum((after[name].double() - before[name].double()).square().sum().item() for name in names)
    size = sum(before[name].double().square().sum().item() for name in names)
    share = (change / size) ** 0.5 if size else 0.0
    return [f"left out: {first_of(names)}, which a LoRA cannot hold; they differ by {share:.2%} of their norm"]


def _contract(first: Base, second: Base, rank: int) -> dict[str, Any]:
    """Return the base's identity, and the tuned model's inference settings if it has a contract."""
    settings = {name: second.contract[name] for name, key in CONTRACT_KEYS.items()
                if key.merged and name in second.contract}  # fmt: skip
    own = {
        "base": first.label,
        "base_kind": first.kind,
        "base_revision": first.revision,
        "base_fingerprint": first.fingerprint("transformer"),
        "sd3tune_version": __version__,
        "method": "extract",
        "rank": rank,
        "alpha": rank,
        "trigger": second.contract.get("trigger"),
    }
    return {"encoders": list(ENCODERS), **settings, **declared(own)}

"""`sd3tune lora merge`: merge adapters into one adapter, or into the weights of their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune import __version__
from sd3tune.adapter.attach import match
from sd3tune.adapter.derived import check_out, losses, notes_of, write_form
from sd3tune.adapter.embedding import left_behind
from sd3tune.adapter.file import read_adapter
from sd3tune.adapter.into_base import Weighted, added, check_text, merged_text
from sd3tune.adapter.kinds import require_lora
from sd3tune.adapter.layouts import forms
from sd3tune.adapter.low_rank import truncate, weighted_sum
from sd3tune.adapter.rearrange import first_of
from sd3tune.errors import AdapterError, ConfigError, RunError
from sd3tune.files.regular import sha256_of
from sd3tune.inference.conditions import find_base
from sd3tune.inference.lora_argument import parse_lora
from sd3tune.model.base.contract import CONTRACT_KEYS, declared, sampling_of
from sd3tune.model.base.folder import check_parts, write_model
from sd3tune.model.base.parts import ENCODER_OF, ENCODERS, LABELS
from sd3tune.model.load.components import empty_transformer, load_transformer, stored_dtype
from sd3tune.runtime.device import dtype_name

METHODS = ("concat", "svd")


def merge_loras(
    wanted: Sequence[str], out: Path, form: str, method: str, rank: int | None, *, transformer_only: bool = False
) -> list[str]:
    """Write the weighted sum of the adapters `wanted` (`PATH@weight`) to `out`, in `form`; return summary lines.

    `concat` is exact, and its rank is the sum of all ranks; `svd` is the nearest adapter of `rank`. Raises ConfigError,
    AdapterError for adapters of different bases, and RunError when `out` exists.
    """
    if method not in METHODS:
        raise ConfigError(f"--method {method}: one of {', '.join(METHODS)}")
    if (method == "svd") != (rank is not None):
        raise ConfigError("--method svd needs --rank R" if rank is None else f"--rank {rank}: only with --method svd")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: at least 1")
    if form not in forms():
        raise RunError(f"--to {form}: one of {', '.join(forms())}")
    check_out(out)
    adapters = _read(wanted, transformer_only)
    for adapter, _ in adapters:
        require_lora(adapter, "lora merge without --into-base")
    factors = weighted_sum([(adapter.whole(), weight) for adapter, weight in adapters])
    lines = [*_disagreements(adapters), *_all_notes(adapters)]
    if rank is not None:
        found = {module: truncate(pair, rank) for module, pair in factors.items()}
        factors = {module: truncated.pair for module, truncated in found.items()}
        lines += losses(found)
    highest = max(len(down) for down, _ in factors.values())
    write_form(out, form, factors, _contract(adapters, {"rank": highest, "alpha": highest}), {})
    return [f"{out}: {len(factors)} modules of rank {highest} at most, from {len(adapters)} adapters", *lines]


def merge_into_base(wanted: Sequence[str], out: Path, base: str | None, *, transformer_only: bool = False) -> list[str]:
    """Write the base with the adapters added to its weights, in their stored dtype, to the folder `out`.

    Text encoders that they adapt are written beside the transformer. Returns summary lines. Raises AdapterError for
    adapters of another base, ModelError for a base that is neither a folder nor a Hub id, and RunError when `out`
    exists.
    """
    if out.exists():
        raise RunError(f"--out {out}: exists already, and nothing is overwritten; name another folder")
    adapters = _read(wanted, transformer_only)
    found = find_base(base, [adapter for adapter, _ in adapters])
    check_parts(found, "--into-base")
    skeleton = empty_transformer(found)
    for adapter, _ in adapters:
        unmatched = match(skeleton, adapter).unmatched
        if unmatched:
            raise AdapterError(f"{adapter.path}: {found.name} has no {first_of(unmatched)}, so it cannot be merged")
    usual = {"encoders": list(ENCODERS), **found.contract}
    origin = {"base": found.label, "base_kind": found.kind, "base_revision": found.revision}
    contract = {**usual, **_contract(adapters, {}), **origin}
    check_text(found, adapters, contract["encoders"])
    dtype, text = stored_dtype(found), merged_text(found, adapters)
    tensors = load_transformer(found, torch.float32).state_dict()
    modules = {module for adapter, _ in adapters for module in adapter.sizes}
    for module in modules:
        tensors[f"{module}.weight"] = added(tensors[f"{module}.weight"], module, adapters)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    merged = {f"{part}.{name}": tensor for part, of in text.items() for name, tensor in of.items()}
    _check_range(out, {**{f"{module}.weight": tensors[f"{module}.weight"] for module in modules}, **merged})
    write_model(out, found, tensors, contract, None, text)
    of_text = [f"{len(of)} in {LABELS[ENCODER_OF[part]]}" for part, of in text.items()]
    return [
        f"{out}: {found.name} with {len(adapters)} adapters in {len(modules)} of its weights"
        + f", and {', '.join(of_text)}" * bool(of_text),
        *_all_notes(adapters),
    ]


def _check_range(out: Path, merged: Mapping[str, Tensor]) -> None:
    """Raise AdapterError for a merged weight that is infinite in its dtype."""
    bad = [name.removesuffix(".weight") for name, tensor in merged.items() if not tensor.float().isfinite().all()]
    if bad:
        raise AdapterError(f"{out}: not written: with the adapters {first_of(bad)} exceeds the range of "
                           f"{dtype_name(merged[f'{bad[0]}.weight'].dtype)}; give them smaller weights")  # fmt: skip


def _read(wanted: Sequence[str], transformer_only: bool) -> Weighted:
    parsed = [parse_lora(one, "") for one in wanted]
    return [(read_adapter(path, transformer_only=transformer_only), weight) for path, weight in parsed]


def _all_notes(adapters: Weighted) -> list[str]:
    every = [adapter for adapter, _ in adapters]
    return [*(line for adapter in every for line in notes_of(adapter)), *left_behind(every)]


def _disagreements(adapters: Weighted) -> list[str]:
    first = next((adapter for adapter, _ in adapters if adapter.contract), None)
    lines = []
    for adapter, _ in adapters:
        if first is None or not adapter.contract:
            continue
        for name, key in CONTRACT_KEYS.items():
            if key.difference and adapter.contract.get(name) != first.contract.get(name):
                lines.append(
                    f"warning: {adapter.path} was trained with {key.difference}; the result uses the value of "
                    f"{first.path}"
                )
        if sampling_of(adapter.contract) != sampling_of(first.contract):
            lines.append(
                f"warning: the previews of {adapter.path} had other steps or guidance; the result uses the "
                f"values of {first.path}"
            )
    return lines


def _contract(adapters: Weighted, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first contract's inference settings, all triggers and sources; empty if no adapter has a contract."""
    contracts = [adapter.contract for adapter, _ in adapters if adapter.contract]
    if not contracts:
        return {}
    triggers = dict.fromkeys(str(contract["trigger"]) for contract in contracts if contract.get("trigger"))
    taken = {name: contracts[0][name] for name, key in CONTRACT_KEYS.items() if key.merged and name in contracts[0]}
    own = {
        "sd3tune_version": __version__,
        "method": "merge",
        "merged": [{"sha256": sha256_of(adapter.path), "weight": weight} for adapter, weight in adapters],
        "trigger": ", ".join(triggers) or None,
        **more,
    }
    return {**taken, **declared(own)}

"""Adapter files derived from others: where they may be written, and which metadata stays true."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune.adapter.contents import Pair
from sd3tune.adapter.dora import OF_BASE, OF_BASE_KEY
from sd3tune.adapter.file import Adapter, check_finite, contract_metadata, in_dtype, save_tensors
from sd3tune.adapter.layouts import DORA_SCALE, forms
from sd3tune.adapter.low_rank import Truncated
from sd3tune.adapter.lycoris import Parts, size_of
from sd3tune.adapter.metadata import CONTRACT_KEY, PEFT_KEY, is_safetensors
from sd3tune.adapter.modelspec import OF_THE_TENSORS, shown_metadata
from sd3tune.adapter.peft_config import peft_metadata
from sd3tune.adapter.rearrange import arrange, arrange_lycoris
from sd3tune.adapter.released import fitting_variants
from sd3tune.config.meaning import keys_of_ranks
from sd3tune.config.sections.method import METHOD_SECTIONS
from sd3tune.errors import AdapterError, RunError
from sd3tune.model.lora.targets import block_of
from sd3tune.runtime.device import DTYPES

_STALE = re.compile(r"format|ss_network_.*|ss_output_name|sshs_.*|modelspec\.(hash|implementation).*")
"""Metadata about the original tensors, which no longer applies."""


def check_out(out: Path) -> None:
    """Raise RunError unless `out` can be a new safetensors file."""
    if not is_safetensors(out.name):
        raise RunError(f"--out {out}: an adapter is one file: name it *.safetensors")
    if out.exists():
        raise RunError(f"--out {out}: exists already, and nothing is overwritten; name another place")


def notes_of(adapter: Adapter) -> list[str]:
    """Return notes to print about an adapter: an assumed alpha, ignored tensors."""
    return [f"note: {adapter.label}: {note}" for note in adapter.notes]


def form_of(adapter: Adapter) -> str:
    """Return the writable form that is closest to the adapter's own."""
    return next((form for form, layout in forms().items() if layout.name == adapter.layout), "diffusers")


def write_form(
    out: Path,
    form: str,
    factors: Mapping[str, Pair],
    contract: Mapping[str, Any],
    metadata: Mapping[str, str],
    *,
    magnitudes: Mapping[str, Tensor] = {},
    lycoris: Mapping[str, Parts] = {},
) -> None:
    """Write `out` from factors whose scale is folded into B; `metadata` comes from an earlier file.

    `magnitudes` are DoRA's (see `arrange`), for ComfyUI's norm unless the form has PEFT's name for them. `lycoris`
    takes the place of factors.

    The dtype is the contract's `export_dtype`, else fp32. Raises AdapterError if the form cannot express a module, or a
    value is not finite.
    """
    try:
        tensors = arrange_lycoris(lycoris, form) if lycoris else arrange(factors, form, magnitudes)
    except AdapterError as error:
        raise AdapterError(*(f"--to {form}: {problem}" for problem in error.problems)) from None
    dtype = DTYPES.get(str(contract.get("export_dtype")), torch.float32)
    tensors = {
        key: tensor if key.endswith(".alpha") else in_dtype(key, tensor, dtype) for key, tensor in tensors.items()
    }
    check_finite(out, tensors)
    remade = (PEFT_KEY, CONTRACT_KEY, OF_BASE_KEY)
    kept = {key: text for key, text in metadata.items() if key not in remade and not _is_stale(key)}
    if contract:
        kept[CONTRACT_KEY] = contract_metadata(contract)
    inputs = {module: down.shape[1] for module, (down, _) in factors.items()}
    inputs |= {module: size_of(parts)[1] for module, parts in lycoris.items()}
    shown = shown_metadata(form, out.stem, contract, fitting_variants(inputs))
    kept = {**shown, **kept, **{key: shown[key] for key in OF_THE_TENSORS if key in shown}}
    layout = forms()[form]
    if magnitudes and layout.magnitude == DORA_SCALE:
        kept[OF_BASE_KEY] = OF_BASE
    kept |= _for_loaders(form, factors, bool(magnitudes)) if factors else _kept_for_peft(form, contract, metadata)
    save_tensors(out, tensors, kept)


def _for_loaders(form: str, factors: Mapping[str, Pair], dora: bool) -> dict[str, str]:
    """Return the metadata that a form's own tools read: of LoRA's ranks."""
    ranks, layout = {module: len(down) for module, (down, _) in factors.items()}, forms()[form]
    rank = Counter(ranks.values()).most_common(1)[0][0]
    peft = {PEFT_KEY: peft_metadata(ranks, dora)} if layout.has_peft_metadata else {}
    return peft | {key: text.format(rank=rank) for key, text in layout.metadata.items()}


def _kept_for_peft(form: str, contract: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return PEFT's configuration of LoHa or LoKr from an own file; diffusers infers that of other tools' LoKr."""
    return {PEFT_KEY: metadata[PEFT_KEY]} if form == "diffusers" and contract and PEFT_KEY in metadata else {}


def losses(truncated: Mapping[str, Truncated]) -> list[str]:
    """Return a line with the truncation loss, |difference| / |BA|, over all modules and in the worst module."""
    lost, total = (sum(getattr(one, what) for one in truncated.values()) for what in ("lost", "total"))
    shares = {module: one.lost / one.total if one.total else 0.0 for module, one in truncated.items()}
    worst = max(shares, key=lambda module: shares[module])
    overall = (lost / total) ** 0.5 if total else 0.0
    at_most = f"at most {shares[worst] ** 0.5:.3%} in one module ({worst})"
    return [f"lost: {overall:.3%} of the weight update's norm, {at_most}"]


def by_block(truncated: Mapping[str, Truncated]) -> list[str]:
    """Return a line with the truncation loss of each block."""
    blocks: dict[str, list[Truncated]] = {}
    for module, one in truncated.items():
        blocks.setdefault(block_of(module), []).append(one)
    shares = {block: (sum(one.lost for one in of), sum(one.total for one in of)) for block, of in blocks.items()}
    shown = (f"{block} {(lost / total) ** 0.5 if total else 0.0:.3%}" for block, (lost, total) in shares.items())
    return [f"by block: {', '.join(shown)}"]


def contract_of_ranks(contract: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return the contract of the same adapter as a LoRA of another rank, in fp32; empty without a contract."""
    if not contract:
        return {}
    gone = {key for section in METHOD_SECTIONS for key in keys_of_ranks(section)}
    return {**{key: value for key, value in contract.items() if key not in gone}, "rank": rank, "alpha": rank}


def _is_stale(key: str) -> bool:
    return _STALE.fullmatch(key) is not None

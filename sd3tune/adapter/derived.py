"""Adapter files derived from others: where they may be written, and which metadata stays true."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3tune.adapter.file import Adapter, contract_metadata, is_safetensors, save_tensors
from sd3tune.adapter.layouts import forms
from sd3tune.adapter.low_rank import Truncated
from sd3tune.adapter.metadata import CONTRACT_KEY, PEFT_KEY
from sd3tune.adapter.modelspec import OF_THE_TENSORS, shown_metadata
from sd3tune.adapter.peft_config import peft_metadata
from sd3tune.adapter.rearrange import Pair, arrange
from sd3tune.adapter.released import fitting_variants
from sd3tune.errors import AdapterError, RunError

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
    out: Path, form: str, factors: Mapping[str, Pair], contract: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write `out` from factors whose scale is folded into B; `metadata` comes from an earlier file.

    Raises AdapterError if the form cannot express a module, or a value is not finite.
    """
    try:
        tensors = arrange(factors, form)
    except AdapterError as error:
        raise AdapterError(*(f"--to {form}: {problem}" for problem in error.problems)) from None
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise AdapterError(f"{out}: not written: {len(bad)} tensors are NaN or infinite, first {bad[0]}")
    kept = {key: text for key, text in metadata.items() if key not in (PEFT_KEY, CONTRACT_KEY) and not _is_stale(key)}
    if contract:
        kept[CONTRACT_KEY] = contract_metadata(contract)
    shown = shown_metadata(form, out.stem, contract, fitting_variants(factors))
    kept = {**shown, **kept, **{key: shown[key] for key in OF_THE_TENSORS if key in shown}}
    ranks = {module: len(down) for module, (down, _) in factors.items()}
    layout, rank = forms()[form], Counter(ranks.values()).most_common(1)[0][0]
    if layout.has_peft_metadata:
        kept[PEFT_KEY] = peft_metadata(ranks)
    kept |= {key: text.format(rank=rank) for key, text in layout.metadata.items()}
    save_tensors(out, tensors, kept)


def losses(truncated: Mapping[str, Truncated]) -> list[str]:
    """Return a line with the truncation loss, |difference| / |BA|, over all modules and in the worst module."""
    lost, total = (sum(getattr(one, what) for one in truncated.values()) for what in ("lost", "total"))
    shares = {module: one.lost / one.total if one.total else 0.0 for module, one in truncated.items()}
    worst = max(shares, key=lambda module: shares[module])
    overall = (lost / total) ** 0.5 if total else 0.0
    at_most = f"at most {shares[worst] ** 0.5:.3%} in one module ({worst})"
    return [f"lost: {overall:.3%} of the weight update's norm, {at_most}"]


def _is_stale(key: str) -> bool:
    return _STALE.fullmatch(key) is not None

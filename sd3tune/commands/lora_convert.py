"""`sd3tune lora convert`: write an adapter with another tool's names, scales and fused modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sd3tune.adapter.contents import Pair
from sd3tune.adapter.derived import by_block, check_out, contract_of_ranks, losses, notes_of, write_form
from sd3tune.adapter.embedding import left_behind
from sd3tune.adapter.file import read_adapter
from sd3tune.adapter.layouts import forms
from sd3tune.adapter.modelspec import THUMBNAIL_KEY
from sd3tune.adapter.original import fused_ranks
from sd3tune.adapter.text_layouts import by_encoder
from sd3tune.errors import ConfigError, RunError
from sd3tune.inference.of_base import magnitudes_for, nearest_lora
from sd3tune.run.thumbnail import preview_of, thumbnail


def convert_lora(
    source: Path,
    form: str,
    out: Path,
    picture: Path | None = None,
    with_picture: bool = True,
    *,
    transformer_only: bool = False,
    rank: int | None = None,
    base: str | None = None,
) -> list[str]:
    """Write the adapter to `out` in `form`, a name of `adapter.names.forms`, and return summary lines.

    `rank` writes the nearest LoRA of that rank instead of another kind of adapter. DoRA needs the base's weights for
    it, and for other tools' magnitudes: by default those of the base that the adapter names.

    `picture` is the thumbnail for UIs: by default the file's own, else the preview of these weights in their run.
    Raises AdapterError for a file that cannot be read or stored in `form`, DataError for an unreadable picture, and
    RunError when `out` exists.
    """
    if form not in forms():
        raise RunError(f"--to {form}: one of {', '.join(forms())}")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: at least 1")
    check_out(out)
    adapter = read_adapter(source, transformer_only=transformer_only)
    if rank is not None and adapter.kind == "LoRA":
        raise ConfigError(f"--rank {rank}: {adapter.path} is a LoRA already; `sd3tune lora resize` changes its rank")
    metadata = {key: text for key, text in adapter.metadata.items() if with_picture or key != THUMBNAIL_KEY}
    if with_picture and (picture or THUMBNAIL_KEY not in metadata):
        picture = picture or preview_of(adapter.path)
    lines = []
    found = nearest_lora(adapter, rank, base) if rank is not None else {}
    factors = adapter.whole() | {module: one.pair for module, one in found.items()}
    contract = contract_of_ranks(adapter.contract, rank) if rank is not None else adapter.contract
    magnitudes = magnitudes_for(adapter, form, base) if adapter.magnitudes and rank is None else {}
    if magnitudes and form == "kohya":
        lines.append("note: ComfyUI reads the magnitudes (dora_scale) in this file; sd-scripts ignores them")
    if picture is not None:
        metadata |= thumbnail(picture)
        lines.append(f"thumbnail: {picture}; --no-thumbnail leaves it out")
    lycoris = adapter.lycoris if rank is None else {}
    write_form(out, form, factors, contract, metadata, magnitudes=magnitudes, lycoris=lycoris)
    fusing = _fusing(factors) if forms()[form].original else []
    text = f", of which {by_encoder(adapter.text_factors)}" if adapter.text_factors else ""
    errors = [f"a {adapter.kind} as LoRA of rank {rank}", *losses(found), *by_block(found)] if found else []
    return [
        f"{out}: {len({**adapter.sizes, **factors})} modules in {form} layout{text}",
        *errors,
        *fusing,
        *lines,
        *notes_of(adapter),
        *left_behind([adapter]),
    ]


def _fusing(factors: Mapping[str, Pair]) -> list[str]:
    """Return lines on the fused q, k and v, which the layout stores as one module."""
    fused = fused_ranks(factors)
    padded = [ranks for ranks in fused.values() if len(set(ranks)) > 1]
    lines = [f"q, k and v are fused into one module, {len(fused)} times"] if fused else []
    if padded:
        some = ", ".join(map(str, padded[0]))
        lines.append(
            f"in {len(padded)} of them the ranks differ (first: {some}) and are zero-padded to the largest; "
            "rank 0 was not trained. The output does not change"
        )
    return lines

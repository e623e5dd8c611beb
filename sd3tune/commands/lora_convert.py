"""`sd3tune lora convert`: write an adapter with another tool's names, scales and fused modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sd3tune.adapter.derived import check_out, notes_of, write_form
from sd3tune.adapter.file import read_adapter
from sd3tune.adapter.layouts import forms
from sd3tune.adapter.modelspec import THUMBNAIL_KEY
from sd3tune.adapter.rearrange import Pair, fused_ranks
from sd3tune.adapter.text_layouts import by_encoder
from sd3tune.errors import RunError
from sd3tune.run.thumbnail import preview_of, thumbnail


def convert_lora(
    source: Path,
    form: str,
    out: Path,
    picture: Path | None = None,
    with_picture: bool = True,
    *,
    transformer_only: bool = False,
) -> list[str]:
    """Write the adapter to `out` in `form`, a name of `adapter.names.forms`, and return summary lines.

    `picture` is the thumbnail for UIs: by default the file's own, else the preview of these weights in their run.
    Raises AdapterError for a file that cannot be read or stored in `form`, DataError for an unreadable picture, and
    RunError when `out` exists.
    """
    if form not in forms():
        raise RunError(f"--to {form}: one of {', '.join(forms())}")
    check_out(out)
    adapter = read_adapter(source, transformer_only=transformer_only)
    factors = adapter.whole()
    metadata = {key: text for key, text in adapter.metadata.items() if with_picture or key != THUMBNAIL_KEY}
    if with_picture and (picture or THUMBNAIL_KEY not in metadata):
        picture = picture or preview_of(adapter.path)
    lines = []
    if picture is not None:
        metadata |= thumbnail(picture)
        lines.append(f"thumbnail: {picture}; --no-thumbnail leaves it out")
    write_form(out, form, factors, adapter.contract, metadata)
    fusing = _fusing(factors) if forms()[form].original else []
    text = f", of which {by_encoder(adapter.text_factors)}" if adapter.text_factors else ""
    return [f"{out}: {len(factors)} modules in {form} layout{text}", *fusing, *lines, *notes_of(adapter)]


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

"""Captions of a run in numbers: several an image, variants, and texts of single encoders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from sd3tune.config import Config
from sd3tune.data.records import Record
from sd3tune.data.written import READERS, Reader
from sd3tune.encode.captions import text_bytes, texts_read_by
from sd3tune.encode.report import megabytes
from sd3tune.files.text import weighted_words
from sd3tune.model.base.base import Base


def describe_captions(
    config: Config, records: Sequence[Record], base: Base, encoders: Sequence[str], dtype: torch.dtype
) -> list[str]:
    """Return lines about several captions an image, with their disk space, texts of single encoders, and weights."""
    lines = []
    if any(record.choices for record in records):
        each = {encoder: text_bytes(base, encoder, dtype, config.model.t5_lengths) for encoder in encoders}
        drawn = [caption for record in records for caption in record.drawn]
        nbytes = sum(each[encoder] * len(texts_read_by(encoder, (), drawn)) for encoder in encoders)
        lines.append(
            f"captions  {len(set(drawn))} for {len(records)} image{'s' * (len(records) != 1)}, one drawn a step: "
            f"{megabytes(nbytes)} in the store, {megabytes(sum(each.values()))} each{_variants(config)}"
        )
    own = own_readers(records)
    if own:
        flags = {"clip": "--prompt-clip-l and --prompt-clip-g", "t5": "--prompt-t5"}
        read = "CLIP and T5 read" if len(own) > 1 else "CLIP reads" if own == ["clip"] else "T5 reads"
        lines.append(
            f"captions  {read} texts of {'their' if len(own) > 1 else 'its'} own; `infer` takes them with "
            f"{' and '.join(flags[reader] for reader in own)}, and previews use one prompt for all encoders"
        )
    found = next(filter(None, (weighted_words(one.prompt) for one in config.preview.pictures)), None)
    if found:
        lines.append(f"note: preview.prompts: prompt weights such as {found!r} are read as plain text; leave them out")
    return lines


def own_readers(records: Iterable[Record]) -> list[Reader]:
    """Return the encoders that read texts of their own in some caption."""
    drawn = [caption for record in records for caption in record.drawn]
    return [reader for reader in READERS if any(getattr(caption, reader) is not None for caption in drawn)]


def _variants(config: Config) -> str:
    counts = {source.variants for source in config.data.sources if source.tags is not None or source.wildcards}
    return f" (variants: {', '.join(map(str, sorted(counts)))})" if counts else ""

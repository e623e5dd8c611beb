"""Masks of a run in words."""

from __future__ import annotations

from collections.abc import Sequence

from sd3tune.config import Config
from sd3tune.data.records import Record


def describe_masks(config: Config, records: Sequence[Record]) -> list[str]:
    """Return a line for each source with masks: their number, and the loss outside them."""
    lines = []
    for number, source in enumerate(config.data.sources):
        of_source = [record for record in records if record.source == number]
        masks = [record.mask for record in of_source if record.mask]
        if masks:
            what = "alpha channels" if masks[0].is_alpha else "masks"
            base = ", with the base's own prediction as the target" if source.outside_target == "base" else ""
            lines.append(
                f"masks     {source.path}: {what} of {len(masks)} of {len(of_source)} images; outside them the loss "
                f"weighs {source.outside_weight:g}{base}"
            )
    return lines

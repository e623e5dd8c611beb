"""The sizes that images are cut to. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sd3tune.config import Config
from sd3tune.data.buckets import Size, bucket_table, nearest_bucket, size_name
from sd3tune.data.images import upright_size
from sd3tune.data.records import Record


def buckets_of(config: Config, transformer: Mapping[str, Any] | None) -> list[Size]:
    """The sizes that images are cut to, given the transformer's configuration, if that is known."""
    side = config.data.resolution
    largest = None if transformer is None else largest_side(transformer)
    return bucket_table(side, largest) if config.data.buckets else [(side, side)]


def bucket_of(record: Record, buckets: Sequence[Size]) -> Size:
    """The size that a record's image is cut to; without a choice, its file is not opened."""
    return nearest_bucket(upright_size(record.image), buckets) if len(buckets) > 1 else buckets[0]


def largest_side(transformer: Mapping[str, Any]) -> int:
    """`pos_embed` is cut from the middle of a stored grid, and the model raises beyond it. In pixels."""
    return int(transformer["pos_embed_max_size"] * transformer["patch_size"] * 8)


def describe_buckets(cut: Iterable[Size]) -> list[str]:
    """How many images are cut to each size, the most frequent first; nothing when there is only one."""
    counts = Counter(cut)
    listed = ", ".join(f"{size_name(size)}: {count}" for size, count in counts.most_common())
    return [f"buckets   {listed}"] if len(counts) > 1 else []

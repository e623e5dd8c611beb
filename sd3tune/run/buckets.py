"""Bucket sizes of a run's images. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sd3tune.config import Config
from sd3tune.data.buckets import Size, bucket_table, nearest_bucket, size_name
from sd3tune.data.images import upright_size
from sd3tune.data.records import Record


def buckets_of(config: Config, transformer: Mapping[str, Any] | None) -> list[Size]:
    """Return the bucket sizes of a run; `transformer` is its configuration, or None to ignore its size limit."""
    side = config.data.resolution
    largest = None if transformer is None else largest_side(transformer)
    return bucket_table(side, largest) if config.data.buckets else [(side, side)]


def bucket_of(record: Record, buckets: Sequence[Size]) -> Size:
    """Return the bucket of a record's image. The file is not opened if there is only one bucket."""
    return nearest_bucket(upright_size(record.image), buckets) if len(buckets) > 1 else buckets[0]


def largest_side(transformer: Mapping[str, Any]) -> int:
    """Return the longest image side in pixels; larger images raise, as `pos_embed` is cropped from a stored grid."""
    return int(transformer["pos_embed_max_size"] * transformer["patch_size"] * 8)


def describe_buckets(cut: Iterable[Size]) -> list[str]:
    """Return a line with the number of images in each bucket, most frequent first; empty for a single bucket."""
    counts = Counter(cut)
    listed = ", ".join(f"{size_name(size)}: {count}" for size, count in counts.most_common())
    return [f"buckets   {listed}"] if len(counts) > 1 else []

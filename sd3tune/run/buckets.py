"""Bucket sizes of a run's images. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sd3tune.config import Config
from sd3tune.data.buckets import Size, bucket_table, nearest_bucket, size_name
from sd3tune.data.records import Record

Tables = Mapping[int, Sequence[Size]]
"""Side of the square -> the buckets of that size, the square first. No bucket belongs to two sizes."""


def bucket_tables(config: Config, transformer: Mapping[str, Any] | None) -> Tables:
    """Return the buckets of each size of a run, smallest size first.

    `transformer` is the transformer's configuration, or None to ignore its size limit.
    """
    largest = None if transformer is None else largest_side(transformer)
    return {side: bucket_table(side, largest) if config.data.buckets else [(side, side)] for side in config.data.sides}


def buckets_in(tables: Tables) -> list[Size]:
    """Return the buckets of all sizes."""
    return [size for table in tables.values() for size in table]


def bucket_of(record: Record, buckets: Sequence[Size]) -> Size:
    """Return the bucket of a record's image. The file is not opened if there is only one bucket.

    `buckets` are those of the run, for a record without buckets of its own.
    """
    candidates = record.sizes or buckets
    return nearest_bucket(record.upright_size, candidates) if len(candidates) > 1 else candidates[0]


def largest_bucket(sizes: Iterable[Size]) -> Size:
    """Return the bucket with the most pixels."""
    return max(sizes, key=lambda size: size[0] * size[1])


def largest_side(transformer: Mapping[str, Any]) -> int:
    """Return the longest image side in pixels; larger images raise, as `pos_embed` is cropped from a stored grid."""
    return int(transformer["pos_embed_max_size"] * transformer["patch_size"] * 8)


def describe_buckets(cut: Iterable[Size]) -> list[str]:
    """Return a line with the number of images in each bucket, most frequent first; empty for a single bucket."""
    counts = Counter(cut)
    listed = ", ".join(f"{size_name(size)}: {count}" for size, count in counts.most_common())
    return [f"buckets   {listed}"] if len(counts) > 1 else []

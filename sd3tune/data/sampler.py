"""Stateless randomness: the samples of a step, and all random numbers, are functions of integers.

So a run resumes from its step number, two processes get the same samples as one, and nothing between two steps changes
the next.

A global micro-batch is one forward pass of all ranks: `world * batch_size` samples of one bucket. Each bucket has an
endless stream of its samples, reshuffled every epoch; batch j of a bucket is the stream's j-th piece. Epoch e has
the batches floor(e n / batch) to floor((e + 1) n / batch) of a bucket with n samples, shuffled with the other buckets'.
Nothing is padded, and samples that do not fill a batch come first in the next epoch.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import torch

from sd3tune.data.seeds import derive


def generator(seed: int, *counters: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator on `device`, seeded by `derive(seed, *counters)`; the global state does not change."""
    return torch.Generator(device).manual_seed(derive(seed, *counters))


def uniform(seed: int, *counters: int | str) -> float:
    """Return a number in [0, 1), with 53 random bits, as a function of all arguments."""
    return (derive(seed, *counters) >> 10) / 2**53


@functools.lru_cache(maxsize=64)  # one stream per bucket, and a batch may span two epochs
def epoch_order(seed: int, epoch: int, n: int) -> tuple[int, ...]:
    """Return a permutation of `range(n)`: the order of the samples in that epoch."""
    return tuple(torch.randperm(n, generator=generator(seed, "epoch", epoch)).tolist())


def index_at(seed: int, position: int, n: int) -> int:
    """Return the sample in `range(n)` at `position` of the endless stream; each occurs exactly once per epoch."""
    if n < 1:
        raise ValueError(f"a stream needs at least one sample, not {n}")
    epoch, offset = divmod(position, n)
    return epoch_order(seed, epoch, n)[offset]


def batch_samples(seed: int, number: int, buckets: Sequence[tuple[str, int]], batch: int) -> tuple[str, int, list[int]]:
    """Return the bucket of the run's micro-batch `number`, its number in the bucket, and the indices of its samples.

    `buckets` lists names and numbers of samples per epoch. With a single bucket, the batches are consecutive pieces of
    `index_at(seed, ...)`.
    """
    if not buckets or min(n for _, n in buckets) < 1:
        raise ValueError(f"a bucket needs at least one sample: {list(buckets)}")
    counts = tuple(n for _, n in buckets)
    epoch = _epoch_of(number, counts, batch)
    bucket, piece = _epoch_batches(seed, epoch, counts, batch)[number - _batches_before(epoch, counts, batch)]
    name, n = buckets[bucket]
    stream = _stream(seed, name, len(buckets))
    return name, piece, [index_at(stream, position, n) for position in range(piece * batch, (piece + 1) * batch)]


def times_seen(seed: int, batches: int, buckets: Sequence[tuple[str, int]], batch: int) -> list[list[int]]:
    """Return how often each sample of each bucket occurs in the run's first `batches` batches; see `batch_samples`."""
    counts = tuple(n for _, n in buckets)
    epoch = _epoch_of(batches, counts, batch)
    drawn = [epoch * n // batch for n in counts]
    for bucket, _ in _epoch_batches(seed, epoch, counts, batch)[: batches - _batches_before(epoch, counts, batch)]:
        drawn[bucket] += 1
    seen = []
    for (name, n), pieces in zip(buckets, drawn, strict=True):
        passes, rest = divmod(pieces * batch, n)
        begun = set(epoch_order(_stream(seed, name, len(buckets)), passes, n)[:rest])
        seen.append([passes + (index in begun) for index in range(n)])
    return seen


def _stream(seed: int, name: str, buckets: int) -> int:
    """Return the seed of a bucket's stream; a single bucket uses the run's seed."""
    return seed if buckets == 1 else derive(seed, "bucket", name)


def _epoch_of(number: int, counts: tuple[int, ...], batch: int) -> int:
    """Return the epoch of batch `number` of the run."""
    # e epochs have at most e * sum(counts) / batch batches, and fewer by less than one per bucket.
    upper = (number + len(counts)) * batch // sum(counts) + 1
    return bisect.bisect_right(range(upper), number, key=lambda e: _batches_before(e, counts, batch)) - 1


def _batches_before(epoch: int, counts: tuple[int, ...], batch: int) -> int:
    return sum(epoch * n // batch for n in counts)


@functools.lru_cache(maxsize=4)
def _epoch_batches(seed: int, epoch: int, counts: tuple[int, ...], batch: int) -> list[tuple[int, int]]:
    """Return (bucket, number in its stream) of every batch of an epoch: buckets shuffled, each in stream order."""
    following = [epoch * n // batch for n in counts]
    ends = [(epoch + 1) * n // batch for n in counts]
    labels = [bucket for bucket, end in enumerate(ends) for _ in range(end - following[bucket])]
    batches = []
    for place in torch.randperm(len(labels), generator=generator(seed, "buckets", epoch)).tolist():
        bucket = labels[place]
        batches.append((bucket, following[bucket]))
        following[bucket] += 1
    return batches


def step_slots(micro: int, rank: int, world: int, batch_size: int) -> range:
    """Return the slots, within its optimizer step, of one rank's batch in micro-step `micro`.

    Ranks are adjacent inside a micro-step, so two processes with batch size 1 together get the samples of one process
    with batch size 2.
    """
    first = (micro * world + rank) * batch_size
    return range(first, first + batch_size)

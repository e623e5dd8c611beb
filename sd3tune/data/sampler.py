"""Randomness as a function: the samples of a step, and every random number, from integers only.

There is no state. So a run resumes from its step number, two processes see the samples that one would, and nothing
between two steps can disturb the next.

A global micro-batch is one forward pass of all ranks: `world * batch_size` samples of one bucket. Each bucket has an
endless stream of its samples, reshuffled each time through; batch j of a bucket is the stream's j-th piece. Epoch e has
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
    """A fresh generator on `device`, seeded by `derive(seed, *counters)`; the global state is left alone."""
    return torch.Generator(device).manual_seed(derive(seed, *counters))


def uniform(seed: int, *counters: int | str) -> float:
    """A number in [0, 1) from all arguments, with 53 random bits."""
    return (derive(seed, *counters) >> 10) / 2**53


@functools.lru_cache(maxsize=64)  # streams for each bucket, and a batch may straddle two epochs
def epoch_order(seed: int, epoch: int, n: int) -> tuple[int, ...]:
    """A permutation of `range(n)`: the order in which that epoch sees its samples."""
    return tuple(torch.randperm(n, generator=generator(seed, "epoch", epoch)).tolist())


def index_at(seed: int, position: int, n: int) -> int:
    """The sample in `range(n)` at `position` of the endless stream; each comes exactly once per epoch."""
    if n < 1:
        raise ValueError(f"a stream needs at least one sample, not {n}")
    epoch, offset = divmod(position, n)
    return epoch_order(seed, epoch, n)[offset]


def batch_samples(seed: int, number: int, buckets: Sequence[tuple[str, int]], batch: int) -> tuple[str, int, list[int]]:
    """The bucket of global micro-batch `number` of the run, its own number there, and the indices of its samples.

    `buckets` lists names and numbers of samples per epoch. With a single bucket the batches are simply the pieces of
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
    """How often each sample of each bucket comes in the run's first `batches` batches; see `batch_samples`."""
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
    """The seed of a bucket's stream; a lone bucket has the run's own."""
    return seed if buckets == 1 else derive(seed, "bucket", name)


def _epoch_of(number: int, counts: tuple[int, ...], batch: int) -> int:
    """The epoch that holds batch `number` of the run."""
    # e epochs hold at most e * sum(counts) / batch batches, and fall short of that by less than one a bucket.
    upper = (number + len(counts)) * batch // sum(counts) + 1
    return bisect.bisect_right(range(upper), number, key=lambda e: _batches_before(e, counts, batch)) - 1


def _batches_before(epoch: int, counts: tuple[int, ...], batch: int) -> int:
    return sum(epoch * n // batch for n in counts)


@functools.lru_cache(maxsize=4)
def _epoch_batches(seed: int, epoch: int, counts: tuple[int, ...], batch: int) -> list[tuple[int, int]]:
    """The (bucket, number in that bucket's stream) of every batch of an epoch: buckets mixed, each in stream order."""
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
    """The slots, within its optimizer step, of one rank's batch in micro-step `micro`.

    Ranks lie side by side inside a micro-step, so two processes with batch 1 see together what one with batch
    2 sees.
    """
    first = (micro * world + rank) * batch_size
    return range(first, first + batch_size)

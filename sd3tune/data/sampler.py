"""Stateless randomness: the samples of a step, and all random numbers, are functions of integers.

So a run resumes from its step number, two processes get the same samples as one, and nothing between two steps changes
the next.

A global micro-batch is one forward pass of all ranks: `world * batch_size` samples of one bucket. Each bucket has an
endless stream of its samples, reshuffled every epoch; batch j of a bucket is the stream's j-th piece. Epoch e has
the batches floor(e n / batch) to floor((e + 1) n / batch) of a bucket with n samples, shuffled with the other buckets'.
Nothing is padded, and samples that do not fill a batch come first in the next epoch.

A bucket may have parts, one for each concept, of which an epoch draws given numbers instead of all samples once. Each
part has an endless stream of its own; epoch e of the bucket has the samples floor(e r) to floor((e + 1) r) of a part
with rate r, shuffled with the other parts'.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from fractions import Fraction

import torch

from sd3tune.data.seeds import derive

Rate = int | Fraction
"""Number of samples that an epoch draws."""
Parts = tuple[tuple[int, Rate], ...]
"""(number of samples, rate) of each part of a bucket."""
Buckets = Sequence[tuple[str, int | Parts]]
"""Name of each bucket, and its number of samples, which an epoch draws once each, or its parts."""


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


def batch_samples(seed: int, number: int, buckets: Buckets, batch: int) -> tuple[str, int, list[int]]:
    """Return the bucket of the run's micro-batch `number`, its number in the bucket, and the indices of its samples.

    Indices count through the parts of a bucket. With a single bucket without parts, the batches are consecutive pieces
    of `index_at(seed, ...)`.
    """
    every = tuple(_parts(samples) for _, samples in buckets)
    if not every or min(n for parts in every for n, _ in parts) < 1:
        raise ValueError(f"a bucket needs at least one sample: {list(buckets)}")
    epoch = _epoch_of(number, every, batch)
    bucket, piece = _epoch_batches(seed, epoch, every, batch)[number - _batches_before(epoch, every, batch)]
    name = buckets[bucket][0]
    stream = _stream(seed, name, len(buckets))
    positions = range(piece * batch, (piece + 1) * batch)
    return name, piece, [_sample_at(stream, position, every[bucket]) for position in positions]


def times_seen(seed: int, batches: int, buckets: Buckets, batch: int) -> list[list[int]]:
    """Return how often each sample of each bucket occurs in the run's first `batches` batches; see `batch_samples`."""
    every = tuple(_parts(samples) for _, samples in buckets)
    epoch = _epoch_of(batches, every, batch)
    drawn = [_positions_before(epoch, parts) // batch for parts in every]
    for bucket, _ in _epoch_batches(seed, epoch, every, batch)[: batches - _batches_before(epoch, every, batch)]:
        drawn[bucket] += 1
    return [
        _times_in(_stream(seed, name, len(buckets)), pieces * batch, parts)
        for (name, _), pieces, parts in zip(buckets, drawn, every, strict=True)
    ]


def _times_in(stream: int, positions: int, parts: Parts) -> list[int]:
    """Return how often each sample of a bucket occurs in the first `positions` of its stream."""
    counts = [positions]
    if len(parts) > 1:
        epoch = _epoch_at(positions, parts)
        counts = [epoch * rate // 1 for _, rate in parts]
        for part, _ in _epoch_parts(stream, epoch, parts)[: positions - _positions_before(epoch, parts)]:
            counts[part] += 1
    seen = []
    for part, ((n, _), count) in enumerate(zip(parts, counts, strict=True)):
        passes, rest = divmod(count, n)
        begun = set(epoch_order(_stream_of_part(stream, part, len(parts)), passes, n)[:rest])
        seen += [passes + (index in begun) for index in range(n)]
    return seen


def _parts(samples: int | Parts) -> Parts:
    return ((samples, samples),) if isinstance(samples, int) else samples


def _stream(seed: int, name: str, buckets: int) -> int:
    """Return the seed of a bucket's stream; a single bucket uses the run's seed."""
    return seed if buckets == 1 else derive(seed, "bucket", name)


def _stream_of_part(stream: int, part: int, parts: int) -> int:
    """Return the seed of a part's stream; a single part uses its bucket's."""
    return stream if parts == 1 else derive(stream, "part", part)


def _sample_at(stream: int, position: int, parts: Parts) -> int:
    """Return the sample at `position` of a bucket's endless stream."""
    if len(parts) == 1:
        return index_at(stream, position, parts[0][0])
    epoch = _epoch_at(position, parts)
    part, number = _epoch_parts(stream, epoch, parts)[position - _positions_before(epoch, parts)]
    before = sum(n for n, _ in parts[:part])
    return before + index_at(_stream_of_part(stream, part, len(parts)), number, parts[part][0])


def _epoch_at(position: int, parts: Parts) -> int:
    """Return the epoch of a position of a bucket's stream."""
    upper = (position + len(parts)) // sum(rate for _, rate in parts) + 1
    return bisect.bisect_right(range(upper), position, key=lambda e: _positions_before(e, parts)) - 1


def _positions_before(epoch: int, parts: Parts) -> int:
    return sum(epoch * rate // 1 for _, rate in parts)


def _epoch_of(number: int, every: tuple[Parts, ...], batch: int) -> int:
    """Return the epoch of batch `number` of the run."""
    # Without rounding, e epochs have e * sum(rates) / batch batches; they lose less than a sample per part, and less
    # than a batch per bucket.
    lost = len(every) * batch + sum(map(len, every))
    upper = (number * batch + lost) // sum(rate for parts in every for _, rate in parts) + 1
    return bisect.bisect_right(range(upper), number, key=lambda e: _batches_before(e, every, batch)) - 1


def _batches_before(epoch: int, every: tuple[Parts, ...], batch: int) -> int:
    return sum(_positions_before(epoch, parts) // batch for parts in every)


@functools.lru_cache(maxsize=4)
def _epoch_batches(seed: int, epoch: int, every: tuple[Parts, ...], batch: int) -> list[tuple[int, int]]:
    """Return (bucket, number in its stream) of every batch of an epoch: buckets shuffled, each in stream order."""
    first, last = ([_positions_before(e, parts) // batch for parts in every] for e in (epoch, epoch + 1))
    return _shuffled(first, last, generator(seed, "buckets", epoch))


@functools.lru_cache(maxsize=64)
def _epoch_parts(stream: int, epoch: int, parts: Parts) -> list[tuple[int, int]]:
    """Return (part, number in its stream) of every sample of a bucket's epoch: parts shuffled, each in stream order."""
    first, last = ([e * rate // 1 for _, rate in parts] for e in (epoch, epoch + 1))
    return _shuffled(first, last, generator(stream, "parts", epoch))


def _shuffled(first: Sequence[int], last: Sequence[int], random: torch.Generator) -> list[tuple[int, int]]:
    """Return (label, number) for the numbers from `first` up to `last` of each label, labels shuffled."""
    labels = [label for label, end in enumerate(last) for _ in range(end - first[label])]
    following, turns = list(first), []
    for place in torch.randperm(len(labels), generator=random).tolist():
        label = labels[place]
        turns.append((label, following[label]))
        following[label] += 1
    return turns


def step_slots(micro: int, rank: int, world: int, batch_size: int) -> range:
    """Return the slots, within its optimizer step, of one rank's batch in micro-step `micro`.

    Ranks are adjacent inside a micro-step, so two processes with batch size 1 together get the samples of one process
    with batch size 2.
    """
    first = (micro * world + rank) * batch_size
    return range(first, first + batch_size)

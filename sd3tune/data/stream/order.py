"""The order of a stream as pure functions of the seed, and of the place in the stream of a rank.

The shards are shuffled anew for each epoch, and the ranks take turns: each reads every `world`-th of the endless
sequence of shards. A rank shuffles the samples of `buffer` shards together: its window. The samples of all windows, in
this order, have the positions 0, 1, ... of the rank. A broken sample has a position, too.
"""

from __future__ import annotations

from sd3tune.data.sampler import epoch_order, index_at
from sd3tune.data.seeds import derive


def shards_of_window(seed: int, rank: int, world: int, window: int, shards: int, buffer: int) -> list[int]:
    """Return the shards, in `range(shards)`, of a rank's window.

    Whole windows of all ranks together have every shard equally often; within an epoch no shard occurs twice.
    """
    turns = range(window * buffer, (window + 1) * buffer)
    return [index_at(derive(seed, "shards"), turn * world + rank, shards) for turn in turns]


def samples_of_window(seed: int, rank: int, window: int, samples: int) -> tuple[int, ...]:
    """Return a permutation of `range(samples)`: the order of the samples of a rank's window."""
    return epoch_order(derive(seed, "samples of shards", rank), window, samples)

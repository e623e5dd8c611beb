"""Randomness as a function: which samples a step sees, and every random number, from integers alone.

Nothing here keeps a state, so a run resumes from its step number, two processes see what one would, and
nothing that happens between two steps can disturb the next.

An optimizer step consumes `accumulation * world * batch_size` slots. Slot `s` of step `t` stands at position
`t * slots_per_step + s` of an endless stream of samples that is shuffled anew every epoch.
"""

from __future__ import annotations

import functools
import hashlib
import json

import torch


def derive(seed: int, *counters: int | str) -> int:
    """A number in [0, 2^63) from all arguments and their order: one seed per purpose, step and slot."""
    canonical = json.dumps([seed, *counters], separators=(",", ":")).encode()
    return int.from_bytes(hashlib.blake2b(canonical, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *counters: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded by `derive(seed, *counters)`; the global state is left alone."""
    return torch.Generator(device).manual_seed(derive(seed, *counters))


@functools.lru_cache(maxsize=4)  # a batch may straddle two epochs; validation has an order of its own
def epoch_order(seed: int, epoch: int, n: int) -> tuple[int, ...]:
    """A permutation of `range(n)`: the order in which that epoch sees its samples."""
    return tuple(torch.randperm(n, generator=generator(seed, "epoch", epoch)).tolist())


def index_at(seed: int, position: int, n: int) -> int:
    """The sample in `range(n)` at `position` of the endless stream; each comes exactly once per epoch."""
    if n < 1:
        raise ValueError(f"a stream needs at least one sample, not {n}")
    epoch, offset = divmod(position, n)
    return epoch_order(seed, epoch, n)[offset]


def step_slots(micro: int, rank: int, world: int, batch_size: int) -> range:
    """The slots, within its optimizer step, of one rank's batch in micro-step `micro`.

    Ranks lie side by side inside a micro-step, so two processes with batch 1 see together what one with batch
    2 sees.
    """
    first = (micro * world + rank) * batch_size
    return range(first, first + batch_size)

"""Which processes the others wait for, by the key-value store of the launch.

Each process counts its collective operations there: one that is stuck has begun fewer than those that wait for it. A
thread of each also counts the time: of a process that was stopped, it stands still. The launcher keeps the store, or
rank 0 where there is no launcher.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sd3tune.reporting import say

_BEGUN, _BEAT = "sd3tune/begun/{}", "sd3tune/beat/{}"
_ANSWER = 20.0
"""Seconds that the store has to answer."""
_LONGEST_INTERVAL = 5.0
"""Seconds between beats, which are shorter for a short timeout."""
_WARNED_AT = 0.8
"""The share of the timeout after which the missing ranks are named, as NCCL ends a process without an exception."""


class _Own:
    """The operations of this process, which has one group, and its interval of beats."""

    begun = 0
    since = 0.0
    interval = 0.0


def arrive() -> None:
    """Count an operation of this process, before it begins. Costs a message to the store."""
    _Own.begun, _Own.since = _Own.begun + 1, time.monotonic()
    _store().set(_BEGUN.format(torch.distributed.get_rank()), str(_Own.begun))


def missing_ranks() -> list[int]:
    """Return the ranks that have begun fewer operations than this process, else those that are stopped.

    Empty if that cannot be known. It is rank 0 if the store does not answer, as only its process can have stopped
    without ending this one. Takes three intervals of beats at most, within `naming_missing_ranks`.
    """
    found = list[list[int]]()

    def ask() -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            behind = [rank for rank, count in enumerate(_counts(_BEGUN)) if count < _Own.begun]
            found.append(behind or _stopped())

    asking = threading.Thread(target=ask, daemon=True)  # the store's client may wait forever
    asking.start()
    asking.join(_ANSWER)
    if not found:
        return [0] if torch.distributed.get_rank() > 0 else []
    return found[0]


@contextlib.contextmanager
def naming_missing_ranks(minutes: float) -> Iterator[None]:
    """Warn, in the body, when this process has waited for most of `minutes`, and name the ranks it waits for."""
    done, _Own.interval = threading.Event(), min(_LONGEST_INTERVAL, 60 * minutes / 20)
    threading.Thread(target=_beat, args=(done,), daemon=True).start()
    threading.Thread(target=_watch, args=(60 * minutes, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _beat(done: threading.Event) -> None:
    beats = 0
    while not done.wait(_Own.interval):
        if torch.distributed.is_initialized():
            beats += 1
            with contextlib.suppress(RuntimeError, ValueError):
                _store().set(_BEAT.format(torch.distributed.get_rank()), str(beats))


def _watch(seconds: float, done: threading.Event) -> None:
    named = 0
    while not done.wait(_Own.interval):
        waited = time.monotonic() - _Own.since
        if named == _Own.begun or waited < _WARNED_AT * seconds or not torch.distributed.is_initialized():
            continue
        named = _Own.begun
        absent = missing_ranks()
        if absent and torch.distributed.get_rank() == _first_present(absent):
            say(
                f"warning: {_processes(absent)} did not arrive for {waited / 60:.3g} minutes, and the others wait; "
                f"after train.process_timeout ({seconds / 60:g} minutes) they end"
            )


def _stopped() -> list[int]:
    """Return the other ranks whose beat stands still; a rank that has not begun to beat counts as going on."""
    before = _counts(_BEAT)
    time.sleep(2.5 * _Own.interval)
    own = torch.distributed.get_rank()
    pairs = enumerate(zip(before, _counts(_BEAT), strict=True))
    return [rank for rank, (then, now) in pairs if rank != own and then == now > 0]


def _counts(key: str) -> list[int]:
    store, names = _store(), [key.format(rank) for rank in range(torch.distributed.get_world_size())]
    return [int(store.get(name)) if store.check([name]) else 0 for name in names]


def _first_present(absent: Sequence[int]) -> int:
    """Return the lowest rank that waits, which speaks for all."""
    return next(rank for rank in range(torch.distributed.get_world_size()) if rank not in absent)


def _processes(ranks: Sequence[int]) -> str:
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()

"""Which processes the others wait for: each counts its collective operations in the key-value store of the launch.

The launcher keeps the store, or rank 0 where there is no launcher. A process that is stopped or stuck has begun fewer
operations than those that wait for it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sd3tune.reporting import say

_KEY = "sd3tune/arrived/{}"
_ANSWER = 10.0
"""Seconds that the store has to answer."""
_WARNED_AT = 0.8
"""The share of the timeout after which the missing ranks are named, as NCCL ends a process without an exception."""


class _Own:
    """The operations of this process; a process has one group."""

    begun = 0
    since = 0.0


def arrive() -> None:
    """Count an operation of this process, before it begins. Costs a message to the store."""
    _Own.begun, _Own.since = _Own.begun + 1, time.monotonic()
    _store().set(_KEY.format(torch.distributed.get_rank()), str(_Own.begun))


def missing_ranks() -> list[int]:
    """Return the ranks that have begun fewer operations than this process; empty if that cannot be known.

    It is rank 0 if the store does not answer, as only its process can have stopped without ending this one.
    """
    begun = dict[int, int]()

    def ask() -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            store = _store()
            for rank in range(torch.distributed.get_world_size()):
                key = _KEY.format(rank)
                begun[rank] = int(store.get(key)) if store.check([key]) else 0

    asking = threading.Thread(target=ask, daemon=True)  # the store's client may wait forever
    asking.start()
    asking.join(_ANSWER)
    if len(begun) < torch.distributed.get_world_size():
        return [0] if torch.distributed.get_rank() > 0 else []
    return [rank for rank, count in begun.items() if count < _Own.begun]


@contextlib.contextmanager
def naming_missing_ranks(minutes: float) -> Iterator[None]:
    """Warn, in the body, when this process has waited for most of `minutes`, and name the ranks it waits for."""
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(60 * minutes, done), daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()


def _watch(seconds: float, done: threading.Event) -> None:
    named = 0
    while not done.wait(seconds / 20):
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


def _first_present(absent: Sequence[int]) -> int:
    """Return the lowest rank that waits, which speaks for all."""
    return next(rank for rank in range(torch.distributed.get_world_size()) if rank not in absent)


def _processes(ranks: Sequence[int]) -> str:
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()

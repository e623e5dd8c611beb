"""Threaded work that runs a few items ahead of its consumer."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_THREADS = min(8, os.cpu_count() or 1)  # decoding and scaling release the interpreter lock


def in_pieces(function: Callable[[_Item], _Result], items: Sequence[_Item], size: int) -> Iterator[_Result]:
    """Yield results as `ahead` does, with up to `size` items per task, for work that costs less than a task."""
    size = max(1, min(size, len(items) // (4 * _THREADS)))  # few items are divided evenly over the threads
    pieces = (items[start : start + size] for start in range(0, len(items), size))
    for results in ahead(lambda piece: [function(item) for item in piece], pieces):
        yield from results


def ahead(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Yield the results of `function` in order, from threads that run only a few items ahead of the consumer."""
    pending: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * _THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

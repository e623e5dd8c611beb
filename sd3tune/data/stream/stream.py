"""The batches of a stream: samples of the windows in their order, collected until a bucket fills a batch.

Which samples make batch k follows from the seed and k. To find them without reading everything before, each window
notes in a file which batch it begins with and which samples were left over; without that file they are read again.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from sd3tune.data.stream.order import samples_of_window, shards_of_window
from sd3tune.errors import DataError
from sd3tune.files.json import NotJson, parse

Item = TypeVar("Item")
Place = tuple[int, int]
"""(window, index of the sample in it)."""
Items = Sequence[Item | None]
"""The samples of a shard in its order; None for a broken one."""
_KEPT = 128
"""Batches before the last one asked for whose windows stay: conditions are read up to 64 batches ahead."""


@dataclass(frozen=True)
class Window(Generic[Item]):
    """The batches that are filled while a window is read."""

    number: int
    first: int
    """Number of its first batch."""
    batches: Sequence[Sequence[Item]]
    left: Sequence[tuple[Place, Item]]
    """The samples of incomplete batches, in the order of their positions."""

    @property
    def end(self) -> int:
        return self.first + len(self.batches)


class Stream(Generic[Item]):
    """The batches of one rank, each of one bucket. Thread-safe.

    `read(shard)` returns the samples of a shard, `bucket(sample)` the bucket of one. `notes` is the file of windows;
    None has none.
    """

    def __init__(
        self,
        read: Callable[[int], Items[Item]],
        bucket: Callable[[Item], Hashable],
        *,
        seed: int,
        rank: int,
        world: int,
        shards: int,
        buffer: int,
        batch_size: int,
        notes: Path | None = None,
    ) -> None:
        self.read, self.bucket, self.batch_size = read, bucket, batch_size
        self.seed, self.rank, self.world, self.shards = seed, rank, world, shards
        self.buffer = min(buffer, max(1, shards // world))
        self._notes = notes
        self._recent: deque[Window[Item]] = deque()
        self._ahead: tuple[int, Future[list[Item | None]]] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        self._lock = threading.Lock()

    def batch(self, number: int) -> Sequence[Item]:
        """Return the samples of batch `number`. Raises DataError if shards cannot be read or hold no sample."""
        with self._lock:
            if not self._recent or number < self._recent[0].first:
                self._recent = deque([self._resumed(number)])
            empty = 0
            while number >= self._recent[-1].end:
                last = self._recent[-1]
                self._recent.append(self._filled(last.number + 1, last.end, last.left))
                empty = 0 if self._recent[-1].batches or self._recent[-1].left != last.left else empty + 1
                if empty * self.buffer * self.world > self.shards:
                    raise DataError("data.sources: no shard has a sample that can be read")
                while self._recent[0].end < number - _KEPT and len(self._recent) > 1:
                    self._recent.popleft()
            window = next(window for window in self._recent if number < window.end)
            return window.batches[number - window.first]

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _filled(self, number: int, first: int, left: Sequence[tuple[Place, Item]]) -> Window[Item]:
        """Read a window, and fill batches with its samples after those that are left over."""
        samples = self._samples(number, ahead=True)
        waiting: dict[Hashable, list[tuple[Place, Item]]] = {}
        batches = []
        order = [((number, index), samples[index]) for index in self._order(number, samples)]
        for place, item in [*left, *order]:
            if item is None:
                continue
            together = waiting.setdefault(self.bucket(item), [])
            together.append((place, item))
            if len(together) == self.batch_size:
                batches.append([one for _, one in waiting.pop(self.bucket(item))])
        window = Window(number, first, batches, [one for of in waiting.values() for one in of])
        self._note(window, left)
        return window

    def _order(self, number: int, samples: Sequence[object]) -> tuple[int, ...]:
        return samples_of_window(self.seed, self.rank, number, len(samples))

    def _samples(self, number: int, ahead: bool = False) -> list[Item | None]:
        """Return the samples of a window; with `ahead`, begin to read the next one."""
        known = self._ahead if self._ahead and self._ahead[0] == number else None
        samples = known[1].result() if known else self._read_window(number)
        if ahead:
            self._ahead = number + 1, self._reader.submit(self._read_window, number + 1)
        return samples

    def _read_window(self, number: int) -> list[Item | None]:
        shards = shards_of_window(self.seed, self.rank, self.world, number, self.shards, self.buffer)
        return [item for shard in shards for item in self.read(shard)]

    def _resumed(self, number: int) -> Window[Item]:
        """Return the window to go on with to find batch `number`: the last one that is noted, else the first."""
        window, first, places = max((note for note in self._noted() if note[1] <= number), default=(0, 0, []))
        windows = {of: self._samples(of) for of in dict.fromkeys(of for of, _ in places)}
        left = [((of, index), item) for of, index in places if (item := windows[of][index]) is not None]
        return self._filled(window, first, left)

    def _noted(self) -> list[tuple[int, int, list[Place]]]:
        """Return the noted windows as (number, first batch, places of the samples left over before it)."""
        found: list[tuple[int, int, list[Place]]] = []
        with contextlib.suppress(OSError, NotJson, ValueError, KeyError, TypeError):
            for line in self._notes.read_text().splitlines() if self._notes else ():
                note = parse(line)
                places = [(int(window), int(index)) for window, index in note["left"]]
                found.append((int(note["window"]), int(note["batch"]), places))
        return found

    def _note(self, window: Window[Item], left: Sequence[tuple[Place, Item]]) -> None:
        if self._notes is None:
            return
        line = json.dumps({"window": window.number, "batch": window.first, "left": [place for place, _ in left]})
        with contextlib.suppress(OSError):
            self._notes.parent.mkdir(parents=True, exist_ok=True)
            with self._notes.open("a") as file:
                file.write(line + "\n")

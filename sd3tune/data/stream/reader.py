"""Read the samples of shards as records, and pass over broken ones up to a limit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd3tune.config.sections.data import DataConfig, StreamConfig
from sd3tune.data.ahead import in_pieces
from sd3tune.data.images import check_shape, read_picture
from sd3tune.data.records import Record, read_record
from sd3tune.data.stream.rows import list_row_shards
from sd3tune.data.stream.shards import Shard, list_shards
from sd3tune.data.stream.tar import Sample, captions_of, image_of, samples_of
from sd3tune.errors import DataError

_PIECE = 8
"""Samples per task of a thread."""
_LEAST = 64
"""Pixels to which a JPEG may be reduced while it is decoded to see whether it is sound."""
_NAMED = 5

STREAMS: Mapping[str, Callable[[int, Any], list[Shard]]] = {"webdataset": list_shards, "dataset": list_row_shards}
"""Kind of a source that streams -> function that lists the shards of a source, given its index."""


@dataclass(frozen=True, slots=True)
class StreamedImage:
    """A sample that can be trained on."""

    record: Record
    digest: str
    """SHA-256 of the image's bytes."""
    mark: str
    """See `Reading.mark`."""


def shards_of(data: DataConfig) -> list[Shard]:
    """Return the shards of all sources. Raises DataError with every problem."""
    found, problems = list[Shard](), list[str]()
    for number, source in enumerate(data.sources):
        try:
            found += STREAMS[source.kind](number, source)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return found


class ShardReader:
    """Reads shards, and counts the different broken samples. Thread-safe.

    `folder` is for copies of remote shards; `warn` receives a line for each broken sample.
    """

    def __init__(
        self, data: DataConfig, seed: int, shards: Sequence[Shard], folder: Path, warn: Callable[[str], None]
    ) -> None:
        self.data, self.seed, self.shards, self.folder, self.warn = data, seed, shards, folder, warn
        self.limit = (data.stream or StreamConfig()).max_broken
        self._broken: dict[str, None] = {}
        self._lock = threading.Lock()

    def read(self, number: int) -> list[StreamedImage | None]:
        """Return the samples of a shard in its order; None for a broken one.

        Raises DataError if the shard cannot be read, and for more broken samples than the limit.
        """
        shard = self.shards[number]
        samples, wrong = samples_of(shard.open(self.folder), shard.name)
        if wrong is not None:
            self._pass_over([wrong])
        found = list[StreamedImage | None]()
        for result in in_pieces(lambda sample: self._streamed(shard, *sample), samples, _PIECE):
            if isinstance(result, DataError):
                self._pass_over(result.problems)
            found.append(None if isinstance(result, DataError) else result)
        return found

    def _streamed(self, shard: Shard, name: str, sample: Sample) -> StreamedImage | DataError:
        image, source = image_of(sample), self.data.sources[shard.source]
        try:
            if image is None:
                return DataError(f"{shard.name}/{name}: has no image, only {', '.join(sample)}")
            listed = captions_of(sample, source)
            record, picture = read_record(
                self.data, self.seed, shard.source, image, listed, lambda ref: read_picture(ref, at_least=_LEAST)
            )
            check_shape(image, picture.size)
        except DataError as error:
            return error
        return StreamedImage(replace(record, size=picture.size), picture.digest, picture.reading.mark)

    def _pass_over(self, problems: Sequence[str]) -> None:
        with self._lock:
            new = [line for line in problems[:1] if line not in self._broken]
            self._broken.update(dict.fromkeys(new))
            if len(self._broken) > self.limit:
                first = "; ".join(list(self._broken)[:_NAMED])
                raise DataError(
                    f"data.stream.max_broken: {len(self._broken)} samples are broken, and at most {self.limit} are "
                    f"passed over: {first}"
                )
        for line in new:
            self.warn(f"passed over, {len(self._broken)} of at most {self.limit}: {line}")

"""The shards of a streamed dataset: the rows of each are copied to a tar file without a name."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sd3tune.config.sections.data import DatasetSource
from sd3tune.data.sources.dataset import stream_rows, streamed
from sd3tune.data.stream.shards import Shard, copied


def list_row_shards(number: int, source: DatasetSource) -> list[Shard]:
    """Return the shards of source `number`, as `datasets` divides it. Raises DataError."""
    dataset = streamed(source)
    place = f"{source.path}:{source.split}"
    return [
        Shard(number, f"{place} shard {index}", (f"{place} {index}", 0), _opener(dataset, source, index))
        for index in range(dataset.num_shards)
    ]


def _opener(dataset: Any, source: DatasetSource, index: int) -> Callable[[Path], BinaryIO]:
    def write(file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w:") as tar:
            for name, data in _files(dataset, source, index):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))

    return lambda folder: copied(folder, write)


def _files(dataset: Any, source: DatasetSource, index: int) -> Iterator[tuple[str, bytes]]:
    for row, (data, texts) in enumerate(stream_rows(dataset, source, index)):
        name = f"{row:08d}"
        if data is not None:
            yield f"{name}.png", data  # the extension only says that it is an image
        yield f"{name}.json", json.dumps(texts).encode()

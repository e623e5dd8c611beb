"""The sizes that each image of a run is cropped to. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from sd3tune.config.sections.data import DataConfig
from sd3tune.data.buckets import Size, nearest_bucket
from sd3tune.data.images import is_smaller
from sd3tune.data.records import Record
from sd3tune.errors import ConfigError
from sd3tune.run.buckets import Tables

Warn = Callable[[str], None]
SizeOf = Callable[[Record], Size]
"""The (height, width) of a record's upright image."""


def _upright(record: Record) -> Size:
    return record.upright_size


def _ignored(line: str) -> None: ...


def in_all_sizes(
    data: DataConfig, records: Sequence[Record], tables: Tables, warn: Warn = _ignored, size_of: SizeOf = _upright
) -> list[Record]:
    """Return a record for each image and size, all sizes of an image in a row; see `DataConfig.enlarge`.

    In a run with a single size, the records have no buckets of their own. `warn` receives a line for each size that
    leaves out images. Raises ConfigError for a size that would be without images.
    """
    found, too_small = list[Record](), dict[int, list[Record]]()
    several, enlarges = len(tables) > 1, data.enlarges
    sizes = [data.sizes_of(number) for number in range(len(data.sources))]
    for record in records:
        height_and_width = None if enlarges else size_of(record)
        for side, share in sizes[record.source]:
            if height_and_width and is_smaller(height_and_width, nearest_bucket(height_and_width, tables[side])):
                too_small.setdefault(side, []).append(record)
                continue
            buckets = tuple(tables[side]) if several else ()
            found.append(replace(record, repeats=record.repeats * share, sizes=buckets))
    _check_left_out(data, records, too_small)
    for line in _left_out(records, found, too_small):
        warn(line)
    return found


def samples_of(data: DataConfig, records: Sequence[Record]) -> int:
    """Return the number of samples per epoch if no image is left out of a size."""
    shares = [sum(share for _, share in data.sizes_of(number)) for number in range(len(data.sources))]
    return sum(record.repeats * shares[record.source] for record in records)


def used_images(records: Sequence[Record], sized: Sequence[Record]) -> list[Record]:
    """Return the records of the images that some size uses."""
    used = {id(record.image) for record in sized}
    return [record for record in records if id(record.image) in used]


def held_out_size(data: DataConfig, records: Sequence[Record], tables: Tables) -> list[Record]:
    """Return the held-out images, each in the largest of its sizes that it need not be enlarged for.

    An image that is too small for all of them has the smallest.
    """
    if len(tables) == 1:
        return list(records)
    sized = []
    for record in records:
        size = record.upright_size
        sides = sorted(side for side, _ in data.sizes_of(record.source))
        fitting = [side for side in sides if data.enlarges or not is_smaller(size, nearest_bucket(size, tables[side]))]
        sized.append(replace(record, sizes=tuple(tables[fitting[-1] if fitting else sides[0]])))
    return sized


def describe_sizes(data: DataConfig) -> str:
    """Return `1024 px`, or `512, 768 and 1024 px`."""
    *others, last = map(str, data.sides)
    return f"{', '.join(others)} and {last} px" if others else f"{last} px"


def _check_left_out(data: DataConfig, records: Sequence[Record], too_small: Mapping[int, Sequence[Record]]) -> None:
    """Raise ConfigError if all images of a size are too small for it."""
    problems = []
    for side, left_out in sorted(too_small.items()):
        wanted = [record for record in records if side in (one for one, _ in data.sizes_of(record.source))]
        if len(left_out) == len(wanted):
            problems.append(
                f"data.resolution: all images are too small for {side} px, such as {left_out[0].image.name}; leave "
                "the size out, or set data.enlarge=true"
            )
    if problems:
        raise ConfigError(*problems)


def _left_out(
    records: Sequence[Record], found: Sequence[Record], too_small: Mapping[int, Sequence[Record]]
) -> list[str]:
    """Return a line for each size that leaves out images, and for the images that no size uses."""
    lines = [
        f"{_named(left_out)} too small for {side} px and left out of that size; data.enlarge=true enlarges them"
        for side, left_out in sorted(too_small.items())
    ]
    used = {id(record.image) for record in found}
    unused = [record for record in records if id(record.image) not in used]
    if unused:
        lines.append(f"{_named(unused)} too small for every size and not used at all; data.enlarge=true uses them")
    return lines


def _named(records: Sequence[Record]) -> str:
    """Return `2 images (a.jpg, b.jpg) are`."""
    names = ", ".join(record.image.name for record in records[:3]) + ", ..." * (len(records) > 3)
    return f"1 image ({names}) is" if len(records) == 1 else f"{len(records)} images ({names}) are"

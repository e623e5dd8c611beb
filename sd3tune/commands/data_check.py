"""`sd3tune data check`: summarise the training data and report its problems."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sd3tune.config import Config, load_config, parse_config
from sd3tune.config.loader import LoadedConfig
from sd3tune.data.ahead import ahead
from sd3tune.data.buckets import Size, nearest_bucket
from sd3tune.data.colour import Reading
from sd3tune.data.duplicates import LEAST_SIDE, near_duplicates, thumbnail
from sd3tune.data.images import ImageRef, check_header, check_shape, is_smaller, read_picture, reading_warnings
from sd3tune.data.masks import check_mask_size, read_mask
from sd3tune.data.records import Record, scan_records
from sd3tune.data.sources.from_path import source_of
from sd3tune.data.written import Caption
from sd3tune.errors import ConfigError, DataError, ModelError
from sd3tune.model.base.base import Base
from sd3tune.model.base.resolve import local_base
from sd3tune.reporting import result, say
from sd3tune.run.buckets import Tables, bucket_tables, buckets_in, describe_buckets
from sd3tune.run.sizes import in_all_sizes
from sd3tune.sampling.contact_sheet import contact_sheet
from sd3tune.sampling.sheet_file import check_sheet, write_sheet

_SHOWN = 10
"""Maximum number of lines in a list."""
_SHEET_IMAGES, _SHEET_COLUMNS, _SHEET_SIDE = 48, 6, 176
_COMMAND = "data check"
_CLIP_TOKENS = 77
_DIMMED = 0.25
"""Brightness outside masks, in the contact sheet."""


@dataclass(frozen=True)
class _ImageProperties:
    """Properties of a decoded image; its pixels are not kept."""

    digest: str
    size: Size
    """(height, width)."""
    thumbnail: np.ndarray
    reading: Reading


@dataclass(frozen=True)
class _CheckedImage:
    """A record with the properties of its image."""

    record: Record
    properties: _ImageProperties

    @property
    def size(self) -> Size:
        return self.properties.size


def load_data(what: str, overrides: Sequence[str] = (), caption: str | None = None) -> LoadedConfig:
    """Return the configuration to check: a run's YAML file, or one source, which is a folder or a dataset.

    `caption` is for images of the source without their own caption. Raises ConfigError.
    """
    if not what.endswith((".yaml", ".yml")):
        return parse_config({"data": {"sources": [source_of(what, caption)]}}, overrides)
    if caption is not None:
        raise ConfigError(f"--caption: {what} already sets the captions; leave --caption out")
    return load_config(what, overrides)


def run_data_check(config: Config, sheet: Path) -> None:
    """Print the report and write the contact sheet. Raises DataError with every problem that prevents training."""
    check_sheet(sheet, _COMMAND)
    scan = scan_records(config.data, config.seed, progress=True, look=_inspect)
    problems = scan.problems
    tables = _tables(config)
    checked: list[_CheckedImage] = []
    for record, found in zip(scan.records, scan.looked, strict=True):
        if isinstance(found, DataError):
            problems += found.problems
        else:
            checked.append(_CheckedImage(record, found))
    areas, of_masks = _check_masks(checked)
    problems += of_masks
    cuts, left_out = list[_Cut](), list[str]()
    try:
        cuts = _cuts(config, tables, checked, left_out.append)
    except ConfigError as error:
        problems += error.problems
    for line in _report(config, cuts, checked):
        say(line)
    for line in _masks(checked, areas):
        say(line)
    readings = [(one.record.image, one.record.unexpected(one.properties.reading)) for one in checked]
    for warning in [*scan.warnings, *left_out, *reading_warnings(readings)]:
        say(f"warning: {warning}")
    if checked:
        _write_sheet(sheet, cuts or [_Cut(one, nearest_bucket(one.size, tables[config.data.side])) for one in checked])
        say(f"sheet     {sheet}")
    if problems:
        result(f"not trainable: {len(problems)} problem{'s' * (len(problems) != 1)}")
        raise DataError(*problems)
    samples, images = sum(cut.repeats for cut in cuts), len({id(cut.one) for cut in cuts})
    result(f"trainable: {images} image{'s' * (images != 1)}, {samples} per epoch")


def _inspect(image: ImageRef) -> _ImageProperties | DataError:
    """Decode an image fully, or return the decoding error. Raises DataError for a bad header or too narrow a shape."""
    try:
        picture = read_picture(image, at_least=LEAST_SIDE)
    except DataError as error:
        check_header(image)
        return error
    check_shape(image, picture.size)
    return _ImageProperties(picture.digest, picture.size, thumbnail(picture.image), picture.reading)


@dataclass(frozen=True)
class _Cut:
    """A checked image and the bucket that it is cropped to, in one of the run's sizes."""

    one: _CheckedImage
    bucket: Size
    repeats: int = 1


def _cuts(config: Config, tables: Tables, checked: Sequence[_CheckedImage], warn: Callable[[str], None]) -> list[_Cut]:
    """Return the crops of the images in all sizes, as training makes them. Raises ConfigError as `in_all_sizes`."""
    by_image = {id(one.record.image): one for one in checked}
    records = [one.record for one in checked]
    sized = in_all_sizes(config.data, records, tables, warn, lambda record: by_image[id(record.image)].size)
    found = [(record, by_image[id(record.image)]) for record in sized]
    buckets = buckets_in(tables)
    return [_Cut(one, nearest_bucket(one.size, record.sizes or buckets), record.repeats) for record, one in found]


def _tables(config: Config) -> Tables:
    """Return the training buckets. If the base is missing or invalid, its size limit is unknown and not applied."""
    try:
        base = local_base(config.model)
        return bucket_tables(config, None if base is None else base.config("transformer"))
    except ModelError:
        return bucket_tables(config, None)


def _report(config: Config, cuts: Sequence[_Cut], checked: Sequence[_CheckedImage]) -> Iterator[str]:
    for number, source in enumerate(config.data.sources):
        count = sum(one.record.source == number for one in checked)
        extras = [
            f"{count} image{'s' * (count != 1)}",
            *([f"x {source.repeats}"] if source.repeats > 1 else []),
            *([f"weight {source.weight:g}"] if source.weight != 1 else []),
            *([f"at most {source.max_samples}"] if source.max_samples else []),
        ]
        named = f" ({source.name})" if source.name else ""
        yield f"source {number}  {source.path}{named}: {', '.join(extras)}"
    if not checked:
        return
    captions = list(dict.fromkeys(caption for one in checked for caption in one.record.drawn if any(caption.texts)))
    if captions:
        yield from _captions(config, captions, len(checked))
    yield from _sizes(cuts) if cuts else ()
    yield from _duplicates(checked)


def _captions(config: Config, captions: Sequence[Caption], images: int) -> Iterator[str]:
    """Yield lines on the captions that training draws from, with their numbers of tokens."""
    several = f" for {images} image{'s' * (images != 1)}" * (len(captions) > images)
    yield f"captions  {len(captions)} different{several}; the first: {captions[0].text[:80]!r}"
    for reader, name in (("clip", "CLIP"), ("t5", "T5")):
        own = next((text for caption in captions if (text := getattr(caption, reader)) is not None), None)
        if own is not None:
            yield f"          {name} reads texts of its own; the first: {own[:80]!r}"
    try:
        base = local_base(config.model)
        limits = {"CLIP": ("clip_l", _CLIP_TOKENS)}
        if config.model.t5:
            limits["T5"] = ("t5", min(config.model.t5_lengths))
        counters = {} if base is None else {name: _counter(base, part) for name, (part, _) in limits.items()}
    except ModelError as error:
        yield from (f"warning: tokens were not counted: {problem}" for problem in error.problems)
        return
    if not counters:
        yield f"tokens    not counted: the tokenizers of {config.model.base} are not on this machine yet"
    for name, count_tokens in counters.items():
        limit = limits[name][1]
        encoder, learned = limits[name][0], config.method.learned_token
        texts = dict.fromkeys(caption.read_by(encoder) for caption in captions)
        counts = {text: count_tokens(learned.as_long(encoder, text) if learned else text) for text in texts}
        longest = max(counts, key=lambda caption: counts[caption])
        yield f"tokens    {name}: at most {counts[longest]} of {limit}"
        beyond = sum(count > limit for count in counts.values())
        if beyond:
            yield (
                f"warning: {beyond} caption{'s' * (beyond != 1)} beyond {limit} {name} tokens: "
                f"of {longest[:60]!r} the last {counts[longest] - limit} are cut off"
            )


def _counter(base: Base, part: str) -> Callable[[str], int]:
    """Return a function that counts an encoder's tokens. Imports torch, which is not needed without captions."""
    from sd3tune.model.load.components import load_tokenizer
    from sd3tune.model.load.text import count_tokens

    return functools.partial(count_tokens, load_tokenizer(base, part))


def _check_masks(checked: Sequence[_CheckedImage]) -> tuple[dict[int, float], list[str]]:
    """Return the number of each image with a mask -> its share inside, and a line for each mask that cannot be used."""

    def look(number: int) -> float | DataError | None:
        record, properties = checked[number].record, checked[number].properties
        if record.mask is None or (record.mask.is_alpha and not properties.reading.transparent):
            return None
        try:
            grey, _ = read_mask(record.mask)
            check_mask_size(record.mask, (grey.height, grey.width), record.image, properties.size)
        except DataError as error:
            return error
        return float(np.asarray(grey).mean()) / 255

    areas, problems = dict[int, float](), list[str]()
    for number, found in enumerate(ahead(look, range(len(checked)))):
        if isinstance(found, DataError):
            problems += found.problems
        elif found is not None:
            areas[number] = found
    return areas, problems


def _masks(checked: Sequence[_CheckedImage], areas: Mapping[int, float]) -> Iterator[str]:
    """Yield the lines on the images with masks and their mean area, and on those without; none without masks."""
    if not areas:
        return
    mean = sum(areas.values()) / len(areas)
    yield f"masks     {len(areas)} of {len(checked)} images, {mean:.0%} of the area on average"
    without = [one.record.image for number, one in enumerate(checked) if number not in areas]
    if without:
        yield f"          without a mask: {_named(without)}"


def _sizes(cuts: Sequence[_Cut]) -> Iterator[str]:
    """Yield a table of image sizes, with the training size, scale factor and cropped share of each."""
    yield from describe_buckets(cut.bucket for cut in cuts)
    yield f"sizes     {'width x height':<16}{'images':>7}   {'trained at':<13}{'scaled':>7}{'cut away':>10}"
    counts = Counter((cut.one.size, cut.bucket) for cut in cuts).most_common()
    for ((high, wide), (to_high, to_wide)), count in counts[:_SHOWN]:
        scale = max(to_high / high, to_wide / wide)
        lost = 1 - to_high * to_wide / (high * scale * wide * scale)
        size, trained = f"{wide} x {high}", f"{to_wide} x {to_high}"
        yield f"          {size:<16}{count:>7}   {trained:<13}{scale:>6.2f}x{lost:>9.0%}"
    if len(counts) > _SHOWN:
        more, rest = len(counts) - _SHOWN, sum(count for _, count in counts[_SHOWN:])
        yield f"          and {more} more size{'s' * (more != 1)}, {rest} image{'s' * (rest != 1)}"
    small = [cut.one.record.image for cut in cuts if is_smaller(cut.one.size, cut.bucket)]
    if small:
        yield f"warning: {len(small)} of {len(cuts)} are enlarged, which blurs the result: {_named(small)}"


def _duplicates(checked: Sequence[_CheckedImage]) -> Iterator[str]:
    by_digest: dict[str, list[_CheckedImage]] = {}
    for one in checked:
        by_digest.setdefault(one.properties.digest, []).append(one)
    exact = [_named([one.record.image for one in found]) for found in by_digest.values() if len(found) > 1]
    yield from _shortened("warning: the same image, byte for byte: ", exact)
    first = [found[0] for found in by_digest.values()]
    near = near_duplicates([one.properties.thumbnail for one in first])
    yield from _shortened(
        "warning: nearly the same picture: ", [_named([first[index].record.image for index in group]) for group in near]
    )


def _shortened(prefix: str, found: Sequence[str]) -> Iterator[str]:
    for line in found[:_SHOWN]:
        yield prefix + line
    if len(found) > _SHOWN:
        yield f"{prefix}{len(found) - _SHOWN} more groups"


def _named(images: Sequence[ImageRef]) -> str:
    return ", ".join(image.name for image in images[:5]) + (", ..." if len(images) > 5 else "")


def _write_sheet(path: Path, cuts: Sequence[_Cut]) -> None:
    """Write the contact sheet, with each image in the last of its sizes."""
    last = list({id(cut.one): cut for cut in cuts}.values())
    shown = last[:: math.ceil(len(last) / _SHEET_IMAGES)]
    tiles = [(_tile(cut), f"{cut.one.record.image.name}  {cut.one.record.caption}") for cut in shown]
    rows = [tiles[start : start + _SHEET_COLUMNS] for start in range(0, len(tiles), _SHEET_COLUMNS)]
    picture = contact_sheet(
        [[tile for tile, _ in row] for row in rows],
        side=_SHEET_SIDE,
        cells=[[label for _, label in row] for row in rows],
    )
    write_sheet(path, _COMMAND, picture)


def _tile(cut: _Cut) -> Image.Image | None:
    """Return the tile of an image, cropped as for training and dark outside its mask.

    None if the image or its mask has become unreadable since.
    """
    high, wide = cut.bucket
    scale = _SHEET_SIDE / max(high, wide)
    fit = functools.partial(ImageOps.fit, size=(round(wide * scale), round(high * scale)))
    try:
        tile = fit(read_picture(cut.one.record.image).image, method=Image.Resampling.LANCZOS)
        if cut.one.record.mask is not None:
            grey = fit(read_mask(cut.one.record.mask)[0], method=Image.Resampling.BILINEAR)
            tile = Image.composite(tile, ImageEnhance.Brightness(tile).enhance(_DIMMED), grey)
    except DataError:
        return None
    return tile

"""The training images and captions of the configured sources."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import regex

from sd3tune.config.sections.data import DataConfig, SourceConfig
from sd3tune.data.ahead import in_pieces
from sd3tune.data.captions import counted, read_sidecar, some
from sd3tune.data.colour import Reading
from sd3tune.data.headers import Headers
from sd3tune.data.images import ImageRef, file_of, upright_size
from sd3tune.data.masks import Mask
from sd3tune.data.seeds import derive
from sd3tune.data.sources.folder import Listing
from sd3tune.data.sources.registry import SOURCES
from sd3tune.data.variants import as_first, unclosed, variants_of
from sd3tune.data.written import (
    READERS,
    Caption,
    Listed,
    UnequalCaptions,
    Written,
    as_listed,
    as_written,
    lines_of,
    paired,
)
from sd3tune.errors import DataError
from sd3tune.files.text import flaw, weighted_words
from sd3tune.reporting import progress_bar

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)  # a set may have a million
class Record:
    """One image with its caption; `source` is the index of its source in the configuration."""

    image: ImageRef
    caption: str
    """The first caption, with template and trigger applied; no variant of it."""
    repeats: int
    source: int
    weight: float = 1.0
    """Factor on this image's loss."""
    own: Caption | None = None
    """The first caption, if single encoders read texts of their own."""
    sizes: tuple[tuple[int, int], ...] = ()
    """The buckets that its image is cropped to the nearest of, (height, width); empty for all of the run."""
    choices: tuple[Caption, ...] = ()
    """The captions to train on, of which each step draws one; empty if there is only the first."""
    mask: Mask | None = None
    """The mask that weighs its loss; None if all of it counts alike."""
    size: tuple[int, int] | None = field(default=None, compare=False)
    """(height, width) of the upright image by its header; None if the header was not read."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) of the upright image. The file is opened only if its header was not read before."""
        return self.size or upright_size(self.image)

    @property
    def first(self) -> Caption:
        """The caption for the held-out loss."""
        return self.own or Caption(self.caption)

    @property
    def drawn(self) -> tuple[Caption, ...]:
        """The captions to train on, at least one."""
        return self.choices or (self.first,)

    def unexpected(self, reading: Reading) -> Reading:
        """Return the reading of the image without transparency if that was asked for as its mask."""
        return replace(reading, transparent=False) if self.mask and self.mask.is_alpha else reading

    @property
    def written(self) -> Listed:
        """The captions to train on, in the form that a source lists them."""
        return as_listed(self.drawn)


@dataclass
class Scan:
    """The result of scanning the sources."""

    records: list[Record] = field(default_factory=list)
    looked: list[Any] = field(default_factory=list)
    """The result of `look` for each record's image; empty without `look`."""
    problems: list[str] = field(default_factory=list)
    """A line per fault."""
    warnings: list[str] = field(default_factory=list)
    """A line for each kind of file that is skipped, or read in an unexpected way."""


def load_records(
    data: DataConfig,
    seed: int = 0,
    progress: bool = False,
    warn: Callable[[str], None] = lambda line: None,
    store: Path | None = None,
) -> list[Record]:
    """Return all images in the order of the sources; within a folder by name, within a dataset by row.

    `seed` is the run's, from which the variants of captions are drawn. `warn` receives a line for everything that is
    skipped. With `store`, the folder of a store, headers of large sets are remembered there. Raises DataError with all
    problems (see `scan_records`).
    """
    headers = Headers(store)
    scan = scan_records(data, seed, progress, headers=headers)
    headers.save()
    if scan.problems:
        raise DataError(*scan.problems)
    for line in scan.warnings:
        warn(line)
    return scan.records


def scan_records(
    data: DataConfig,
    seed: int = 0,
    progress: bool = False,
    look: Callable[[ImageRef], Any] | None = None,
    headers: Headers | None = None,
) -> Scan:
    """Return the usable images, the problems, and warnings about skipped files.

    Problems are missing, empty or unreadable sources, files whose first bytes are not an image's, and images without a
    caption, which remain in the records. Headers are read on threads. With `look`, it is called for each image instead;
    an image for which it raises DataError gets no record.
    """
    scan, headers = Scan(), headers or Headers()
    for number, source in enumerate(data.sources):
        try:
            listing = SOURCES[source.kind](source)
        except DataError as error:
            scan.problems += error.problems
            continue
        scan.warnings += listing.warnings
        chosen, multiline, weighted = _chosen(listing.images, source.max_samples), list[Path](), list[str]()
        examine = functools.partial(_examined, data, seed, number, listing, look or headers.size_of)
        bar = progress_bar(
            in_pieces(examine, chosen, _PIECE),
            desc=f"reading {source.path}",
            total=len(chosen),
            unit="image",
            delay=2,
            disable=not progress,
        )
        for found in bar:
            scan.problems += found.problems
            if found.record is not None:
                scan.records.append(found.record if look else replace(found.record, size=found.looked))
                scan.looked += [found.looked] if look else []
            multiline += [found.joined] if found.joined else []
            weighted += [found.weight] if found.weight else []
        scan.warnings += [*_joined(source.path, multiline), *_weighted(source.path, weighted)]
    scan.warnings = list(dict.fromkeys(scan.warnings))  # a folder may belong to two sources
    return scan


@dataclass(frozen=True)
class _Examined:
    record: Record | None
    looked: Any = None
    problems: Sequence[str] = ()
    joined: Path | None = None
    """The caption file, if its several lines were joined."""
    weight: str | None = None
    """A prompt weight in a caption, such as `(dog:1.3)`."""


def _examined(
    data: DataConfig,
    seed: int,
    number: int,
    listing: Listing,
    look: Callable[[ImageRef], Any],
    item: tuple[ImageRef, Listed],
) -> _Examined:
    """Examine one (image, listed captions) of source `number`."""
    source, (image, listed) = data.sources[number], item
    try:
        looked = look(image)
    except DataError as error:
        return _Examined(None, problems=error.problems)
    repeats = source.repeats * listing.repeats.get(image, 1)
    record = Record(image, "", repeats, number, source.weight, mask=_mask(source, listing, image))
    try:
        sidecar = None if as_written(listed).text else listing.sidecars.get(image)
        captions = _captions(image, listed, sidecar, listing, source)
        broken = (unclosed(text) for caption in captions for text in caption.texts) if source.wildcards else ()
        if part := next(filter(None, broken), None):
            raise DataError(f"{image}: its caption has a wildcard without one of its braces: {part[:60]!r}; close it")
        finish = functools.partial(_finished, image, source.template, data.trigger_of(number))
        first = as_first(captions[0], source).map(finish)
        choices = variants_of(captions, source, seed) or tuple(captions)
        choices = tuple(caption.map(finish) for caption in choices)
    except DataError as error:
        return _Examined(record, looked, error.problems)
    record = replace(
        record,
        caption=first.text,
        own=first if len(first.texts) > 1 else None,
        choices=() if choices == (first,) else choices,
    )
    weights = (weighted_words(text) for caption in captions for text in caption.texts)
    joined = sidecar if "\n" in captions[0].text else None
    return _Examined(record, looked, (), joined, next(filter(None, weights), None))


def read_record(
    data: DataConfig, seed: int, number: int, image: ImageRef, listed: Listed, look: Callable[[ImageRef], _Item]
) -> tuple[Record, _Item]:
    """Return the record of a single image of source `number`, and the result of `look`. Raises DataError."""
    found = _examined(data, seed, number, Listing([]), look, (image, listed))
    if found.record is None or found.problems:
        raise DataError(*found.problems)
    return found.record, found.looked


def _mask(source: SourceConfig, listing: Listing, image: ImageRef) -> Mask | None:
    if source.masks == "alpha":
        return Mask(image, is_alpha=True)
    return Mask(listing.masks[image]) if image in listing.masks and source.masks != "off" else None


def sample_indices(records: Sequence[Record]) -> list[int]:
    """Return the record index of every sample of an epoch: index i occurs `records[i].repeats` times."""
    return [index for index, record in enumerate(records) for _ in range(record.repeats)]


_PIECE = 32
"""Images per task of a thread."""
_LONGEST = 100_000
"""Limit on a caption in characters; encoders read a few hundred words."""

_SPACELESS = r"[\p{Line_Break=Ideographic}\p{Line_Break=Conditional_Japanese_Starter}\p{Line_Break=Complex_Context}]"
"""Characters of scripts without spaces between words, by Unicode's rules for line breaks (UAX 14): Chinese and
Japanese; Thai, Lao, Khmer, Burmese."""
_WORD = rf"[\w--{_SPACELESS}]"


def written_out(caption: str, template: str | None, trigger: str | None) -> str:
    """Apply template and trigger to a caption. Without a template, a missing trigger is put in front."""
    if template is not None:
        return template.format(caption=caption, trigger=trigger)
    if trigger is None or _has(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _has(caption: str, trigger: str) -> bool:
    """Return True if the caption contains the trigger as a whole word, in any case."""
    composed, word = (unicodedata.normalize("NFC", text) for text in (caption, trigger))  # as CLIP's tokenizer does
    before = rf"(?<!{_WORD})" if regex.match(_WORD, word[0], regex.V1) else ""
    behind = rf"(?!{_WORD})" if regex.match(_WORD, word[-1], regex.V1) else ""
    pattern = before + regex.escape(word, literal_spaces=True) + behind
    return regex.search(pattern, composed, regex.V1 | regex.IGNORECASE) is not None


def _chosen(items: Sequence[_Item], count: int | None) -> Sequence[_Item]:
    """Return `count` of the items in order; None returns all.

    The choice depends only on the number of items, and a larger choice contains a smaller one.
    """
    if count is None or count >= len(items):
        return items
    lots = sorted(range(len(items)), key=lambda index: derive(0, "max_samples", index))
    return [items[index] for index in sorted(lots[:count])]


def _joined(place: str, multiline: list[Path]) -> list[str]:
    if not multiline:
        return []
    have = counted(multiline, "caption file has several lines", "caption files have several lines")
    named = some(path.name for path in multiline)
    return [
        f"{place}: {have}, which are joined with spaces into one caption: {named}; captions: lines "
        "reads each line as a caption"
    ]


def _weighted(place: str, weights: list[str]) -> list[str]:
    if not weights:
        return []
    have = "1 caption has" if len(weights) == 1 else f"{len(weights)} captions have"
    return [f"{place}: {have} prompt weights such as {weights[0]!r}, which are read as plain text; remove them"]


def _captions(
    image: ImageRef, listed: Listed, sidecar: Path | None, listing: Listing, source: SourceConfig
) -> list[Caption]:
    """Return an image's captions: the listed ones, else those of its caption file, else the source's. Raises DataError.

    `sidecar` is None if a caption is listed. Texts of single encoders are the listed ones, else in their own files.
    """
    written, name = as_written(listed), Path(image.name)
    own = listing.own_sidecars.get(image, {})
    found: dict[str, tuple[str, ...]] = {
        "text": written.text or ((read_sidecar(sidecar, name),) if sidecar else ()),
        **{
            reader: getattr(written, reader) or ((read_sidecar(own[reader], name),) if reader in own else ())
            for reader in READERS
        },
    }
    if not found["text"] and not (found["clip"] and found["t5"]):
        if source.caption is None:
            file = file_of(image)
            write = f"write one to {file.with_suffix('.txt').name}" if file else "fill its column"
            raise DataError(f"{image}: has no caption; {write} or set the source's caption")
        found["text"] = (source.caption,)
    if source.captions == "lines":
        found = {name: lines_of(texts) for name, texts in found.items()}
    try:
        return paired(Written(**found))
    except UnequalCaptions as error:
        raise DataError(f"{image}: has {error}; give each as many captions, or one") from None


def _finished(image: ImageRef, template: str | None, trigger: str | None, text: str) -> str:
    """Return a caption with template and trigger. Raises DataError for one that no tokenizer reads."""
    return _read_by_tokenizers(image, written_out(text, template, trigger))


def _read_by_tokenizers(image: ImageRef, caption: str) -> str:
    """Return the caption, with its template and trigger. Raises DataError for one that no tokenizer reads."""
    if len(caption) > _LONGEST:
        raise DataError(f"{image}: its caption has {len(caption):,} characters, and at most {_LONGEST:,} are read")
    wrong = flaw(caption)
    if wrong:
        hint = "" if "UTF-8" in wrong else ": it looks like UTF-16; save it as UTF-8"
        raise DataError(f"{image}: its caption {wrong}{hint}")
    return caption

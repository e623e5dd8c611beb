"""Decode every image before anything is loaded, to report broken images and unusual ways of reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sd3tune.data.ahead import in_pieces
from sd3tune.data.images import ImageRef, file_digest, read_picture, reading_warnings
from sd3tune.data.records import Record
from sd3tune.encode.manifest import ImageFacts, Manifest
from sd3tune.errors import DataError
from sd3tune.reporting import progress_bar

_PIECE = 32
"""Images per task of a thread."""


def inspect(refs: Sequence[ImageRef], manifest: Manifest, progress: bool) -> list[ImageFacts]:
    """Return the facts of every image. Raises DataError for all unreadable images at once."""
    results = list(facts_of(refs, manifest, progress))
    raise_if_unreadable(result for result in results if isinstance(result, DataError))
    return [result for result in results if isinstance(result, ImageFacts)]


def raise_if_unreadable(errors: Iterable[DataError]) -> None:
    """Raise a DataError with all of these problems, if there are any."""
    problems = dict.fromkeys(line for error in errors for line in error.problems)
    if problems:
        raise DataError(*problems)


def facts_of(refs: Sequence[ImageRef], manifest: Manifest, progress: bool) -> Iterator[ImageFacts | DataError]:
    """Yield the facts of each image, or why it cannot be read. Images with facts in the manifest are not decoded."""

    def look(ref: ImageRef) -> ImageFacts | DataError:
        try:
            digest = file_digest(ref)
            known = manifest.images.get(str(ref))
            if known is not None and known.digest == digest and known.reading is not None:
                return known
            picture = read_picture(ref)
            return ImageFacts(picture.digest, (picture.image.height, picture.image.width), picture.reading)
        except DataError as error:
            return error

    bar = progress_bar(total=len(refs), desc="checking images", unit="image", delay=1, disable=not progress)
    with bar:
        for result in in_pieces(look, refs, _PIECE):
            yield result
            bar.update()


def warnings_about(records: Sequence[Record], facts: Sequence[ImageFacts]) -> list[str]:
    """Return a warning for each unusual way in which images were read."""
    read = [(record, image.reading) for record, image in zip(records, facts, strict=True) if image.reading]
    return reading_warnings([(record.image, record.unexpected(reading)) for record, reading in read])

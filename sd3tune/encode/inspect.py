"""Decode every image before anything is loaded, to report broken images and unusual ways of reading."""

from __future__ import annotations

from collections.abc import Sequence

from sd3tune.data.ahead import ahead
from sd3tune.data.images import ImageRef, file_digest, read_picture, reading_warnings
from sd3tune.data.records import Record
from sd3tune.encode.manifest import ImageFacts, Manifest
from sd3tune.errors import DataError
from sd3tune.reporting import progress_bar


def inspect(refs: Sequence[ImageRef], manifest: Manifest, progress: bool) -> list[ImageFacts]:
    """Return the facts of every image. Images with facts in the manifest are not decoded again.

    Raises DataError for all unreadable images at once.
    """

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
    results = []
    with bar:
        for result in ahead(look, refs):
            results.append(result)
            bar.update()
    problems = dict.fromkeys(line for result in results if isinstance(result, DataError) for line in result.problems)
    if problems:
        raise DataError(*problems)
    return [result for result in results if isinstance(result, ImageFacts)]


def warnings_about(records: Sequence[Record], facts: Sequence[ImageFacts]) -> list[str]:
    """Return a warning for each unusual way in which images were read."""
    read = [(record, image.reading) for record, image in zip(records, facts, strict=True) if image.reading]
    return reading_warnings([(record.image, record.unexpected(reading)) for record, reading in read])

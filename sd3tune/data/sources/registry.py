"""The kinds of data source, each with a function that lists its images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sd3tune.config.sections.data import DatasetSource, Source, WebDatasetSource
from sd3tune.config.variants import SOURCE, Registry
from sd3tune.data.sources.dataset import list_with_masks
from sd3tune.data.sources.folder import Listing, list_folder
from sd3tune.errors import DataError


def _list_dataset(source: DatasetSource) -> Listing:
    rows, masks = list_with_masks(source)
    return Listing(rows, masks=masks)


def _refuse_shards(source: WebDatasetSource) -> Listing:
    raise DataError(f"{source.path}: shards are read by `sd3tune train` only; unpack one to look at its images")


SOURCES: Registry[Callable[[Any], Listing]] = Registry(
    SOURCE,
    {
        "folder": list_folder,
        "dataset": _list_dataset,
        "webdataset": _refuse_shards,
    },
)


def register_source(section: type[Source], list_images: Callable[[Any], Listing]) -> None:
    """Add a kind of source.

    `list_images(settings)` returns its images in a stable order, each with its caption, a `data.written.Written` for
    several, or None, and raises DataError for faults. An image is a `Path` or any other `data.images.ImageRef`. Raises
    ValueError for a kind that is already registered.
    """
    SOURCES.register(section, list_images)

"""The kinds of data source, each with a function that lists its images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sd3tune.config.sections.data import Source
from sd3tune.config.variants import SOURCE, Registry
from sd3tune.data.sources.dataset import list_rows
from sd3tune.data.sources.folder import Listing, list_folder

SOURCES: Registry[Callable[[Any], Listing]] = Registry(
    SOURCE,
    {
        "folder": list_folder,
        "dataset": lambda source: Listing(list_rows(source)),
    },
)


def register_source(section: type[Source], list_images: Callable[[Any], Listing]) -> None:
    """Add a kind of source.

    `list_images(settings)` returns its images in a stable order, each with its caption, a `data.written.Written` for
    several, or None, and raises DataError for faults. An image is a `Path` or any other `data.images.ImageRef`. Raises
    ValueError for a kind that is already registered.
    """
    SOURCES.register(section, list_images)

"""The photos of a folder, the captions and masks that they have, and the places of new ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd3tune.config.sections.data import FolderSource
from sd3tune.data.images import ImageRef, file_of
from sd3tune.data.sources.folder import Listing, list_folder
from sd3tune.data.written import READERS, Listed, as_written
from sd3tune.errors import DataError


@dataclass(frozen=True)
class Photo:
    """A photo that training would read."""

    image: ImageRef
    path: Path
    has_caption: bool
    """True with a caption file or a text in metadata, or if every text encoder has a text of its own."""
    caption_file: Path | None
    mask: ImageRef | None
    """Its mask, beside it or named by metadata."""
    shares_stem: bool
    """True if the name of another photo in its folder differs in the extension only: `dog.jpg` and `dog.png`."""

    @property
    def new_caption_file(self) -> Path:
        """The caption file to write: `dog.txt`, or `dog.jpg.txt` where `dog.txt` would be read for two photos."""
        return self.path.with_name((self.path.name if self.shares_stem else self.path.stem) + ".txt")

    @property
    def new_mask(self) -> Path:
        """The mask to write: `dog-masklabel.png`."""
        return self.path.with_name(f"{self.path.stem}-masklabel.png")


def photos_in(folder: Path, recursive: bool) -> tuple[list[Photo], Sequence[str]]:
    """Return the photos of a folder as training reads them, and a line about each kind of skipped file.

    Raises DataError for a folder without photos, or with invalid metadata.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the folder of the photos")
    listing = list_folder(FolderSource(path=str(folder), recursive=recursive))
    found = [(image, path, listed) for image, listed in listing.images if (path := file_of(image)) is not None]
    stems = Counter(_stem(path) for _, path, _ in found)
    photos = [
        Photo(
            image,
            path,
            _has_caption(listing, image, listed),
            listing.sidecars.get(image),
            listing.masks.get(image),
            stems[_stem(path)] > 1,
        )
        for image, path, listed in found
    ]
    return photos, listing.warnings


def _has_caption(listing: Listing, image: ImageRef, listed: Listed) -> bool:
    written, own = as_written(listed), listing.own_sidecars.get(image, {})
    for_each = all(reader in own or getattr(written, reader) for reader in READERS)
    return bool(written.text) or image in listing.sidecars or for_each


def _stem(path: Path) -> tuple[Path, str]:
    return path.parent, path.stem.casefold()

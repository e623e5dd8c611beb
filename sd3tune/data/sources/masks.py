"""The masks of a folder source: files next to the photos, or in a folder of masks."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sd3tune.config.sections.data import FolderSource
from sd3tune.data.captions import counted, some
from sd3tune.data.formats import EXTENSIONS
from sd3tune.data.names import Names, folded
from sd3tune.errors import DataError

ENDINGS = ("_mask", "-masklabel")
"""Ends of a mask's name, without its extension; the second is OneTrainer's. The first one applies."""


@dataclass
class FoundMasks:
    """The masks of a folder source."""

    of: dict[Path, Path] = field(default_factory=dict)
    """Photo -> its mask."""
    files: set[Path] = field(default_factory=set)
    """Files that are masks, so no photos."""
    notes: list[str] = field(default_factory=list)
    """A line for each kind of mask that is not used, or file that may be a mask."""


def mask_folder(source: FolderSource) -> Path | None:
    """Return the folder of masks; None without one."""
    return None if source.masks in (None, "alpha", "off") else Path(str(source.masks))


def find_masks(
    source: FolderSource,
    images: Collection[Path],
    elsewhere: Iterable[Path],
    in_metadata: Collection[Path],
    named: Mapping[Path, Path],
) -> FoundMasks:
    """Return the masks of a source among its `images`, which include the masks, and in its folder of masks.

    `elsewhere` are images in other folders, next to images that the metadata describes. An image that the metadata
    describes is a photo; `named` are the masks that the metadata names. Raises DataError for a folder of masks that is
    missing or has no mask for any photo.
    """
    found, folder = FoundMasks(), mask_folder(source)
    found.files |= {*named.values()} - {*in_metadata}
    if folder is not None and folder != Path(source.path) and folder.is_relative_to(source.path):
        found.files |= {path for path in images if path.is_relative_to(folder)} - {*in_metadata}
    neighbours = _neighbours({*images, *elsewhere} - found.files, in_metadata)
    found.files.update(*neighbours.values())
    photos = [path for path in images if path not in found.files]
    if folder is not None:
        _take_from(folder, Path(source.path), photos, found)
    elif source.masks is None:
        found.of = {photo: neighbours[photo][0] for photo in photos if photo in neighbours} | {**named}
        second = dict.fromkeys(path for masks in neighbours.values() for path in masks if path not in found.of.values())
        if second:
            are = counted([*second], "second mask is", "second masks are")
            found.notes.append(f"{source.path}: {are} not read: {some(path.name for path in second)}")
    alone = sorted(path for path in photos if path not in in_metadata and _masked_stem(path) is not None)
    if alone:
        are = "file is named like a mask, but its photo is not there; it is read as a photo"
        are_several = "files are named like masks, but their photos are not there; they are read as photos"
        found.notes.append(f"{source.path}: {counted(alone, are, are_several)}: {some(path.name for path in alone)}")
    return found


def _masked_stem(path: Path) -> str | None:
    """Return the name without extension of the photo that a file may be the mask of, in its `folded` form."""
    stem = folded(path.stem)
    return next((stem.removesuffix(ending) for ending in ENDINGS if stem.endswith(ending)), None)


def _neighbours(files: Iterable[Path], in_metadata: Collection[Path]) -> dict[Path, list[Path]]:
    """Return photo -> the masks next to it. `dog_mask.png` is one if there is an image `dog` of any format."""
    stems = {path: folded(path.stem) for path in files}
    like_masks = [path for path, stem in stems.items() if stem.endswith(ENDINGS)]
    if not like_masks:
        return {}
    concerned = {stem for path in like_masks for stem in (stems[path], _masked_stem(path))}
    by_stem: dict[tuple[Path, str], list[Path]] = {}
    related = [path for path, stem in stems.items() if stem in concerned]
    for path in sorted(related, key=lambda path: (not stems[path].endswith(ENDINGS[0]), path.parts)):
        by_stem.setdefault((path.parent, stems[path]), []).append(path)
    masks: dict[Path, list[Path]] = {}
    for of in by_stem.values():
        for path in of:
            stem = None if path in in_metadata else _masked_stem(path)
            for photo in by_stem.get((path.parent, stem), ()) if stem is not None else ():
                masks.setdefault(photo, []).append(path)
    return masks


def _take_from(folder: Path, root: Path, photos: Iterable[Path], found: FoundMasks) -> None:
    """Find the mask of each photo in the folder of masks, under the photo's path in the source."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of masks; check masks in data.sources")
    if folder == root:
        raise DataError(f"{folder}: is the folder of the photos; leave masks out, as masks next to photos are found")
    names = Names()
    for photo in photos:
        relative = PurePosixPath(photo.relative_to(root).as_posix())
        candidates = (names.find(folder, relative.with_name(name)) for name in _names_in_folder(relative))
        mask = next(filter(None, candidates), None)
        if mask is not None:
            found.of[photo] = mask
    if not found.of:
        raise DataError(
            f"{folder}: has no mask for any photo in {root}; name them like the photos, such as dog.png for dog.jpg"
        )
    used = {*found.of.values()}
    unused = [path for path in _images_below(folder) if path not in used]
    if unused:
        belong = counted(unused, "mask belongs to no photo", "masks belong to no photo")
        found.notes.append(f"{folder}: {belong}: {some(path.name for path in unused)}")


def _names_in_folder(photo: PurePosixPath) -> Iterator[str]:
    """Yield the possible names of a photo's mask in a folder of masks; the first one that exists applies."""
    yield photo.name
    for ending in ("", *ENDINGS):
        for name in (photo.stem, photo.name):
            yield from (f"{name}{ending}{extension}" for extension in (".png", *EXTENSIONS))


def _images_below(folder: Path) -> list[Path]:
    found = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.name.lower().endswith(EXTENSIONS) and not path.name.startswith("."))

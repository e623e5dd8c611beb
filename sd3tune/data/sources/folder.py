"""A folder as a source: its images, their captions, and the skipped files."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from sd3tune.config.sections.data import FolderSource
from sd3tune.data.captions import counted, own_sidecars, sidecars, some, unread
from sd3tune.data.formats import EXTENSIONS, HEIC, HEIC_EXTRA, PILLOWS_FORMATS, is_picture
from sd3tune.data.images import FileBelow, ImageRef
from sd3tune.data.names import Names
from sd3tune.data.sources.masks import find_masks
from sd3tune.data.sources.metadata import metadata_files, read_metadata
from sd3tune.data.sources.subfolders import Part, Parts, holds_pictures, is_kohya, parts_of
from sd3tune.data.written import Listed, Reader, as_written
from sd3tune.errors import DataError


@dataclass(frozen=True)
class Listing:
    """The images of a source, in their order."""

    images: Sequence[tuple[ImageRef, Listed]]
    """(image, captions in metadata or columns, or None)."""
    sidecars: Mapping[ImageRef, Path] = field(default_factory=dict)
    """Image -> its caption file, if it has no caption in metadata."""
    warnings: Sequence[str] = ()
    """A line for each kind of skipped file."""
    own_sidecars: Mapping[ImageRef, Mapping[Reader, Path]] = field(default_factory=dict)
    """Image -> reader -> the file with the text that replaces the caption for it."""
    repeats: Mapping[ImageRef, int] = field(default_factory=dict)
    """Image -> factor on the source's repeats, if it is not 1."""
    masks: Mapping[ImageRef, ImageRef] = field(default_factory=dict)
    """Image -> the picture of its mask."""


@dataclass
class _PassedOver:
    """Files that look like images but are not read, by reason."""

    unreadable: list[Path] = field(default_factory=list)
    dangling: list[Path] = field(default_factory=list)
    special: list[Path] = field(default_factory=list)
    subfolders: list[Path] = field(default_factory=list)

    def reasons(self) -> list[str]:
        found = []
        if self.unreadable:
            named = some(path.name for path in self.unreadable)
            are = counted(self.unreadable, "picture is", "pictures are")
            heic = f"; HEIC needs {HEIC_EXTRA}" * any(path.suffix.lower() in HEIC for path in self.unreadable)
            found.append(f"{are} passed over: {named}; convert to JPEG or PNG{heic}")
        if self.dangling:
            leads = counted(self.dangling, "link leads", "links lead")
            found.append(f"{leads} nowhere: {some(path.name for path in self.dangling)}; link or copy again")
        if self.special:
            are = counted(self.special, "is no file but a pipe, socket or device", "are pipes, sockets or devices")
            found.append(f"{are}: {some(path.name for path in self.special)}; remove or replace")
        if self.subfolders:
            named = some(path.name for path in self.subfolders)
            are = counted(self.subfolders, "subfolder with pictures is", "subfolders with pictures are")
            kohya = ", or layout: kohya" * any(is_kohya(path.name) for path in self.subfolders)
            found.append(
                f"{are} not read: {named}; name each as a source, such as {self.subfolders[0]}, or set recursive: "
                f"true{kohya}"
            )
        return found


def list_folder(source: FolderSource) -> Listing:
    """Return the images in the source's folders, and images that their metadata names, without hidden files.

    Raises DataError for a source without images, for invalid metadata, and for a folder that cannot be read.
    """
    folder = Path(source.path)
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; check data.sources")
    if not folder.is_dir():
        dataset = "; for a dataset set kind: dataset" if folder.suffix == ".parquet" else ""
        raise DataError(f"{folder}: is a file; data.sources takes folders of images{dataset}")
    try:
        return _list_parts(source, parts_of(source))
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be listed ({error.strerror}); check its permissions"
        ) from None


def _list_parts(source: FolderSource, found: Parts) -> Listing:
    folder, folders, names = Path(source.path), {part.folder for part in found.parts}, Names()
    part_of: dict[Path, Part] = {}
    listed = _Metadata(with_masks=source.masks is None)
    for part in found.parts:
        in_metadata = listed.add(part.folder, names)
        part_of |= dict.fromkeys([*in_metadata, *images_in(part.folder)], part)
    elsewhere = (path for other in {file.parent for file in listed.captions} - folders for path in images_in(other))
    masks = find_masks(source, part_of, elsewhere, listed.captions, listed.masks)
    images = sorted(part_of.keys() - masks.files, key=lambda path: path.parts)
    reasons = [f"{folder}: {note}" for note in found.passed_over]
    read_elsewhere = {*listed.captions, *masks.of.values()}
    for path in sorted(folders):
        passed_over = _passed_over(path, folders.union(found.links), read_elsewhere)
        reasons += [f"{path}: {reason}" for reason in passed_over.reasons()]
    if not images:
        why = "; ".join(reason.removeprefix(f"{folder}: ") for reason in reasons)
        why = why or "put pictures into it, or name another folder"
        raise DataError(f"{folder}: holds no images ({', '.join(PILLOWS_FORMATS)}); {why}")
    chosen, beside = _caption_files(images, listed, names)
    taken = set(chosen.values())
    own = {path: files for path in images if (files := own_sidecars(path, names, besides=taken))}
    read = {*chosen.values(), *listed.files, *(file for files in own.values() for file in files.values())}
    warnings = [*reasons, *(line for path in sorted({folder, *folders}) for line in unread(path, read, beside))]
    nested = source.recursive or source.layout == "kohya"
    ref_of: dict[Path, ImageRef] = {path: FileBelow(path, folder) if nested else path for path in images}
    return Listing(
        images=[
            (
                ref_of[path],
                listed.captions.get(path) if path in chosen else listed.with_caption(path, part_of[path].caption),
            )
            for path in images
        ],
        sidecars={ref_of[path]: file for path, file in chosen.items()},
        own_sidecars={ref_of[path]: files for path, files in own.items()},
        warnings=[*warnings, *masks.notes],
        repeats={ref_of[path]: part_of[path].repeats for path in images if part_of[path].repeats > 1},
        masks={ref_of[path]: mask for path, mask in masks.of.items()},
    )


@dataclass
class _Metadata:
    """The metadata of the source's folders."""

    with_masks: bool
    """True if rows may name masks."""
    captions: dict[Path, Listed] = field(default_factory=dict)
    """File -> captions; None for a row without one."""
    files: list[Path] = field(default_factory=list)
    file_of: dict[Path, Path] = field(default_factory=dict)
    """Image -> the metadata that names it."""
    masks: dict[Path, Path] = field(default_factory=dict)
    """Image -> the mask that its row names."""

    def with_caption(self, image: Path, caption: str | None) -> Listed:
        """Return the captions of an image, with `caption` if it has no text for all encoders."""
        written = as_written(self.captions.get(image))
        return (written if written.text or caption is None else replace(written, text=(caption,))).plain

    def add(self, folder: Path, names: Names) -> Collection[Path]:
        """Read a folder's metadata, and return its files. Raises DataError for a file in two folders' metadata."""
        rows = read_metadata(folder, names, self.with_masks)
        files = metadata_files(folder, names)
        twice = [path for path in rows.captions if path in self.captions]
        if twice:
            raise DataError(f"{files[0]}: names {twice[0]}, as {self.file_of[twice[0]]} does; keep one of the two rows")
        self.captions |= rows.captions
        self.masks |= rows.masks
        self.files += files
        self.file_of |= dict.fromkeys(rows.captions, files[0]) if rows.captions else {}
        return rows.captions


def images_in(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder with an image's name, without hidden files and subfolders."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and _is_file(entry):
                yield folder / entry.name


def _caption_files(
    images: Sequence[Path], listed: _Metadata, names: Names
) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Return image -> its caption file, and each other caption file of an image -> the file used instead."""
    chosen: dict[Path, Path] = {}
    replaced_by: dict[Path, Path] = {}
    for image in images:
        files = sidecars(image, names)
        if as_written(listed.captions.get(image)).text:
            replaced_by |= dict.fromkeys(files, listed.file_of[image])
        elif files:
            chosen[image] = files[0]
            replaced_by |= dict.fromkeys(files[1:], files[0])
    return chosen, replaced_by


def _passed_over(folder: Path, read: Set[Path], listed: set[Path]) -> _PassedOver:
    """Return what is not read in a folder. `read` has the folders of the source, `listed` the files in metadata."""
    found = _PassedOver()
    read_in = {parent for path in listed for parent in path.parents} | read
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in sorted(kept, key=lambda entry: entry.name):
        if _is_file(entry) and (entry.name.lower().endswith(EXTENSIONS) or not is_picture(entry.name)):
            continue
        path = folder / entry.name
        if path.is_dir():
            if path not in read_in and holds_pictures(path):
                found.subfolders.append(path)
        elif is_picture(path.name) and path not in listed:
            if not path.exists():
                found.dangling.append(path)
            elif path.suffix.lower() not in EXTENSIONS:
                found.unreadable.append(path)
            else:
                found.special.append(path)
    return found


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Return True for a regular file or a link to one; only a link needs a system call."""
    return Path(entry.path).is_file() if entry.is_symlink() else entry.is_file()

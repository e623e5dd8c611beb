"""A folder as a source: its images, their captions, and the skipped files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sd3tune.config.sections.data import FolderSource
from sd3tune.data.captions import counted, sidecars, some, unread
from sd3tune.data.formats import EXTENSIONS, FORMATS, is_picture
from sd3tune.data.images import ImageRef
from sd3tune.data.names import Names
from sd3tune.data.sources.metadata import metadata_files, read_metadata
from sd3tune.errors import DataError


@dataclass(frozen=True)
class Listing:
    """The images of a source, in their order."""

    images: Sequence[tuple[ImageRef, str | None]]
    """(image, caption in metadata or a column, or None)."""
    sidecars: Mapping[ImageRef, Path] = field(default_factory=dict)
    """Image -> its caption file, if it has no caption in metadata."""
    warnings: Sequence[str] = ()
    """A line for each kind of skipped file."""


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
            found.append(f"{are} passed over: {named}; convert to JPEG or PNG")
        if self.dangling:
            leads = counted(self.dangling, "link leads", "links lead")
            found.append(f"{leads} nowhere: {some(path.name for path in self.dangling)}; link or copy again")
        if self.special:
            are = counted(self.special, "is no file but a pipe, socket or device", "are pipes, sockets or devices")
            found.append(f"{are}: {some(path.name for path in self.special)}; remove or replace")
        if self.subfolders:
            named = some(path.name for path in self.subfolders)
            are = counted(self.subfolders, "subfolder with pictures is", "subfolders with pictures are")
            found.append(f"{are} not read: {named}; name each as a source, such as {self.subfolders[0]}")
        return found


def list_folder(source: FolderSource) -> Listing:
    """Return the images in the folder, and images in subfolders that its metadata names, without hidden files.

    Raises DataError for a folder without images, for invalid metadata, and for a folder that cannot be read.
    """
    folder = Path(source.path)
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; check data.sources")
    if not folder.is_dir():
        dataset = "; for a dataset set kind: dataset" if folder.suffix == ".parquet" else ""
        raise DataError(f"{folder}: is a file; data.sources takes folders of images{dataset}")
    names = Names()
    try:
        listed = read_metadata(folder, names)
        found = sorted({*images_in(folder), *listed}, key=lambda path: path.parts)
        passed_over = _passed_over(folder, set(listed))
        if not found:
            why = "; ".join(passed_over.reasons()) or "put pictures into it, or name another folder"
            raise DataError(f"{folder}: holds no images ({', '.join(FORMATS)}); {why}")
        chosen, beside = _caption_files(folder, found, listed, names)
        warnings = [f"{folder}: {reason}" for reason in passed_over.reasons()]
        warnings += unread(folder, [*chosen.values(), *metadata_files(folder, names)], beside)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None
    return Listing([(path, listed.get(path)) for path in found], chosen, warnings)


def images_in(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder with an image's name, without hidden files and subfolders."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and _is_file(entry):
                yield folder / entry.name


def _caption_files(
    folder: Path, images: list[Path], listed: dict[Path, str | None], names: Names
) -> tuple[dict[ImageRef, Path], dict[Path, Path]]:
    """Return image -> its caption file, and each other caption file of an image -> the file used instead."""
    chosen: dict[ImageRef, Path] = {}
    replaced_by: dict[Path, Path] = {}
    for image in images:
        files = sidecars(image, names)
        if listed.get(image) is not None:
            replaced_by |= dict.fromkeys(files, metadata_files(folder, names)[0])
        elif files:
            chosen[image] = files[0]
            replaced_by |= dict.fromkeys(files[1:], files[0])
    return chosen, replaced_by


def _passed_over(folder: Path, listed: set[Path]) -> _PassedOver:
    found = _PassedOver()
    read_in = {parent for path in listed for parent in path.parents}
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in sorted(kept, key=lambda entry: entry.name):
        if _is_file(entry) and (entry.name.lower().endswith(EXTENSIONS) or not is_picture(entry.name)):
            continue
        path = folder / entry.name
        if path.is_dir():
            if path not in read_in and _holds_pictures(path):
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


def _holds_pictures(folder: Path) -> bool:
    """Return True if the folder or a subfolder contains an image. Ignores hidden files; does not follow links."""
    for _, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if any(is_picture(name) and not name.startswith(".") for name in files):
            return True
    return False

"""The caption files of a folder: find and read an image's caption file, and report the unread ones."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Set
from pathlib import Path

from sd3tune.data.names import Names, folded, suffix_of
from sd3tune.data.sources.metadata import clean
from sd3tune.data.written import READERS, Reader
from sd3tune.errors import DataError
from sd3tune.files.regular import complaint, read_regular
from sd3tune.files.text import NotText, decode

_ENDINGS = (".txt", ".caption")
_OF_TEXTS = {*_ENDINGS, ".captions", ".cap", ".tags", ".json", ".jsonl", ".json1", ".csv", ".tsv", ".parquet"}
"""Extensions of files that may hold captions, and are reported if they are not read."""


def sidecars(image: Path, names: Names) -> list[Path]:
    """Return the caption files of an image; the first one applies.

    For `dog.jpg` these are `dog.txt`, `dog.jpg.txt`, `dog.caption` and `dog.jpg.caption`, in any case.
    """
    folder, stems = image.parent, (image.stem, image.name)
    possible, listed = [stem + ending for ending in _ENDINGS for stem in stems], names.listed(folder)
    return [found for name in possible if folded(name) in listed for found in names.in_folder(folder, name)]


def own_sidecars(image: Path, names: Names, besides: Collection[Path]) -> dict[Reader, Path]:
    """Return reader -> caption file that replaces the caption for it: `dog.clip.txt` and `dog.t5.txt`.

    `besides` are the caption files of images, such as that of `dog.clip.jpg`.
    """
    folder, stem = image.parent, image.stem
    listed = names.listed(folder)
    possible = {reader: name for reader in READERS if folded(name := f"{stem}.{reader}.txt") in listed}
    found = {reader: names.in_folder(folder, name) for reader, name in possible.items()}
    return {reader: files[0] for reader, files in found.items() if files and files[0] not in besides}


def read_sidecar(sidecar: Path, image: Path) -> str:
    """Return the caption in the file. Raises DataError."""
    try:
        text = clean(decode(read_regular(sidecar), sidecar))
    except OSError as error:
        raise DataError(f"{sidecar}: {complaint(error)}") from None
    except NotText as error:
        raise DataError(str(error)) from None
    if not text:
        raise DataError(f"{sidecar}: is empty; write a caption for {image.name} or delete the file")
    return text


def unread(folder: Path, read: Set[Path], replaced_by: Mapping[Path, Path]) -> list[str]:
    """Return a line about the files of a folder that look like captions but are not in `read`.

    `replaced_by` maps a caption file to the file that is used for its image instead.
    """
    second, unknown = list[Path](), list[Path]()
    like_text = (folder / name for name in os.listdir(folder) if suffix_of(name) in _OF_TEXTS)
    for path in sorted(path for path in like_text if path not in read):
        if not path.name.startswith(".") and path.is_file():
            (second if path in replaced_by else unknown).append(path)
    lines = []
    if second:
        named = some(f"{path.name} ({replaced_by[path].name} is)" for path in second)
        lines.append(f"{folder}: {counted(second, 'caption file is', 'caption files are')} not read: {named}")
    if unknown:
        names = some(path.name for path in unknown)
        like = counted(unknown, "file looks like captions and is", "files look like captions and are")
        lines.append(f"{folder}: {like} not read: {names}; write NAME.txt beside the picture, or metadata.jsonl")
    return lines


def counted(items: list[Path], one: str, several: str) -> str:
    """Return a number with its noun and verb: `1 file is`, `3 files are`."""
    return f"{len(items)} {one if len(items) == 1 else several}"


def some(names: Iterable[str], count: int = 5) -> str:
    """Return the first few names: `a.heic, b.heic, ...`."""
    listed = list(names)
    return ", ".join(listed[:count]) + ", ..." * (len(listed) > count)

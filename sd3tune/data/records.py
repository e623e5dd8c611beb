"""What is trained on: images and their captions, found in the sources that the configuration names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sd3tune.config.sections.data import DataConfig, FolderSource, SourceConfig
from sd3tune.data.images import EXTENSIONS, ImageRef, check_header
from sd3tune.data.metadata import clean, read_metadata
from sd3tune.data.rows import list_rows
from sd3tune.data.sampler import derive
from sd3tune.errors import DataError


@dataclass(frozen=True)
class Record:
    """One image with its caption; `source` is the index of its source in the configuration."""

    image: ImageRef
    caption: str
    """As it is encoded: template and trigger are in it."""
    repeats: int
    source: int
    weight: float = 1.0
    """Factor on this image's loss."""


def load_records(data: DataConfig, progress: bool = False) -> list[Record]:
    """All images of all sources, in the order of the sources; of a folder by name, of a dataset by row.

    Raises DataError with every problem at once: see `scan_records`.
    """
    records, problems = scan_records(data, progress)
    if problems:
        raise DataError(*problems)
    return records


def scan_records(data: DataConfig, progress: bool = False) -> tuple[list[Record], list[str]]:
    """The images that can be used, and one line for each thing that is wrong.

    Wrong are sources that are missing, empty or not readable, what does not begin like an image (of a file only the
    first bytes are read), and images without a caption, which are among the records nevertheless.
    """
    records: list[Record] = []
    problems: list[str] = []
    for number, source in enumerate(data.sources):
        try:
            found = _chosen(_FINDERS[source.kind](source), source.max_samples)
        except DataError as error:
            problems += error.problems
            continue
        for image, text in tqdm(found, desc=f"reading {source.path}", unit="image", delay=2, disable=not progress):
            try:
                check_header(image)
            except DataError as error:
                problems += error.problems
                continue
            try:
                caption = written_out(_caption(image, text, source), source.template, data.trigger)
            except DataError as error:
                problems += error.problems
                caption = ""
            records.append(Record(image, caption, source.repeats, number, source.weight))
    return records, problems


def sample_indices(records: Sequence[Record]) -> list[int]:
    """The record of every sample of an epoch: index i stands there `records[i].repeats` times."""
    return [index for index, record in enumerate(records) for _ in range(record.repeats)]


def written_out(caption: str, template: str | None, trigger: str | None) -> str:
    """The caption with template and trigger. Without a template, the trigger is put in front where it is lacking."""
    if template is not None:
        return template.format(caption=caption, trigger=trigger)
    if trigger is None or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


_Found = Sequence[tuple[ImageRef, str | None]]
"""Images with the captions that their listing gives."""


def _chosen(found: _Found, count: int | None) -> _Found:
    """`count` of them in their order. The choice depends on their number alone, and a larger one contains a smaller."""
    if count is None or count >= len(found):
        return found
    lots = sorted(range(len(found)), key=lambda index: derive(0, "max_samples", index))
    return [found[index] for index in sorted(lots[:count])]


def _folder_images(source: FolderSource) -> _Found:
    """The images in the folder, and those in its subfolders that its metadata names, by name.

    Other files, hidden files and other subfolders are passed over.
    """
    folder = Path(source.path)
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; check data.sources")
    if not folder.is_dir():
        dataset = "; for a dataset set kind: dataset" if folder.suffix == ".parquet" else ""
        raise DataError(f"{folder}: is a file; data.sources takes folders of images{dataset}")
    try:
        listed = read_metadata(folder)
        found = sorted({*images_in(folder), *listed}, key=lambda path: path.relative_to(folder).parts)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None
    if not found:
        with_images = sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and any(images_in(sub)))
        hint = f"; subfolders are not read: name one, such as {folder / with_images[0]}" if with_images else ""
        raise DataError(f"{folder}: holds no images ({' '.join(EXTENSIONS)}){hint}")
    return [(path, listed.get(path)) for path in found]


_FINDERS: dict[str, Callable[[Any], _Found]] = {"folder": _folder_images, "dataset": list_rows}


def images_in(folder: Path) -> Iterator[Path]:
    """The files of a folder that are images by their names; hidden ones and subfolders are passed over."""
    for path in folder.iterdir():
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file():
            yield path


def _caption(image: ImageRef, listed: str | None, source: SourceConfig) -> str:
    """The caption that the listing gives, else that of a `.txt` beside the file, else the source's."""
    if listed is not None:
        return listed
    beside = _sidecar(image) if isinstance(image, Path) else None
    if beside is not None:
        return beside
    if source.caption is not None:
        return source.caption
    write_one = f"write one to {image.with_suffix('.txt').name}" if isinstance(image, Path) else "fill its column"
    raise DataError(f"{image}: has no caption; {write_one} or set the source's caption")


def _sidecar(image: Path) -> str | None:
    sidecar = image.with_suffix(".txt")
    try:
        text = clean(sidecar.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{sidecar}: cannot be read ({error.strerror}); check its permissions") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{sidecar}: cannot be read as UTF-8 text ({error})") from None
    if not text:
        raise DataError(f"{sidecar}: is empty; write a caption for {image.name} or delete the file")
    return text

"""What is trained on: image files and their captions, found in the folders that the configuration names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from sd3tune.config.schema import DataConfig, SourceConfig
from sd3tune.data.images import EXTENSIONS, check_header
from sd3tune.errors import DataError


@dataclass(frozen=True)
class Record:
    """One image file with its caption; `source` is the index of its source in the configuration."""

    path: Path
    caption: str
    repeats: int
    source: int


def load_records(data: DataConfig, progress: bool = False) -> list[Record]:
    """All images of all sources, in the order of the sources and by file name within each.

    A `.txt` file beside an image wins over the source's caption. Files that are no images by name, hidden
    files and subfolders are passed over. Raises DataError with every problem at once: folders that are
    missing or empty, images without a caption, files that do not begin like an image (only their first bytes
    are read).
    """
    records: list[Record] = []
    problems: list[str] = []
    for number, source in enumerate(data.sources):
        try:
            paths = _image_files(Path(source.path))
        except DataError as error:
            problems += error.problems
            continue
        for path in tqdm(paths, desc=f"reading {source.path}", unit="image", delay=2, disable=not progress):
            try:
                check_header(path)
                records.append(Record(path, _caption(path, source), source.repeats, number))
            except DataError as error:
                problems += error.problems
    if problems:
        raise DataError(*problems)
    return records


def sample_indices(records: Sequence[Record]) -> list[int]:
    """The record of every sample of an epoch: index i stands there `records[i].repeats` times."""
    return [index for index, record in enumerate(records) for _ in range(record.repeats)]


def _image_files(folder: Path) -> list[Path]:
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; check data.sources")
    if not folder.is_dir():
        raise DataError(f"{folder}: is a file; data.sources takes folders of images")
    try:
        found = sorted(_images_in(folder), key=lambda path: path.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from None
    if not found:
        with_images = sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and any(_images_in(sub)))
        hint = f"; subfolders are not read: name one, such as {folder / with_images[0]}" if with_images else ""
        raise DataError(f"{folder}: holds no images ({' '.join(EXTENSIONS)}){hint}")
    return found


def _images_in(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file():
            yield path


def _caption(path: Path, source: SourceConfig) -> str:
    sidecar = path.with_suffix(".txt")
    try:
        text = sidecar.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        if source.caption is None:
            raise DataError(
                f"{path}: has no caption; write one to {sidecar.name} or set the source's caption"
            ) from None
        return source.caption
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{sidecar}: cannot be read as UTF-8 text ({error})") from None
    if not text:
        raise DataError(f"{sidecar}: is empty; write a caption for {path.name} or delete the file")
    return text

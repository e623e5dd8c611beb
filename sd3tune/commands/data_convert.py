"""`sd3tune data convert`: copy images, captions and masks into another dataset format; image bytes do not change."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

from sd3tune.config import parse_config
from sd3tune.config.sections.data import DataConfig
from sd3tune.data.formats import EXTENSIONS
from sd3tune.data.images import ImageRef, file_of, image_bytes
from sd3tune.data.records import Record, load_records
from sd3tune.data.sources.dataset import write_parquet
from sd3tune.data.sources.from_path import source_of
from sd3tune.data.sources.metadata import CSV, JSONL, as_lines, cells_of, write_csv, write_jsonl
from sd3tune.data.sources.row import Row
from sd3tune.errors import DataError, RunError
from sd3tune.files.atomic import new_file, new_folder

_Named = Sequence[tuple[str, Record]]
_Write = Callable[[Path, _Named], None]
_SUFFIXES = {"PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif", "AVIF": ".avif"}
_NOT_UTF8 = re.compile(r"[\ud800-\udfff]")
"""Surrogates, Python's form of file name bytes that are not UTF-8; JSON, CSV and parquet cannot store them."""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_LONGEST_NAME = 200
"""In bytes; most file systems allow 255."""


def run_data_convert(what: str, form: str, out: Path, caption: str | None = None, **columns: str) -> str:
    """Run `convert` on one source: a folder of images, a .parquet file, or a dataset with the given columns."""
    config = parse_config({"data": {"sources": [source_of(what, caption, **columns)]}}).config
    return convert(config.data, form, out)


def convert(data: DataConfig, form: str, out: Path) -> str:
    """Write the images and captions of the only source of `data` to `out`, and return a summary line.

    `form` is sidecar, jsonl or csv, which are folders, or parquet, a file. Raises DataError for data that cannot be
    read or written in that form. Raises RunError when `out` exists, as nothing is overwritten.
    """
    if form not in _FORMS:
        raise RunError(f"--to {form}: one of {', '.join(_FORMS)}")
    is_file = form == "parquet"
    if is_file != (out.suffix == ".parquet"):
        raise RunError(f"--out {out}: --to {form} writes a {'file: name it *.parquet' if is_file else 'folder'}")
    if out.is_file() or (out.is_dir() and (is_file or any(out.iterdir()))):
        raise RunError(f"--out {out}: exists already, and nothing is overwritten; name another place")
    records = load_records(data, progress=True)
    empty = [f"{record.image}: its caption is empty; give it one" for record in records if not record.caption]
    if empty:
        raise DataError(*empty)
    named = list(zip(_names(records, Path(data.sources[0].path), flat=form == "sidecar"), records, strict=True))
    with new_file(out) if is_file else new_folder(out) as temporary:
        _FORMS[form](temporary, named)
    return f"{len(records)} image{'s' * (len(records) != 1)} with captions: {out} ({form})"


def _sidecars(folder: Path, named: _Named) -> None:
    _copy(folder, named)
    for name, record in named:
        for column, texts in cells_of(record.written).items():
            ending = column.removeprefix("text").replace("_", ".") + ".txt"
            text = as_lines(texts) + "\n"
            (folder / name).with_suffix(ending).write_text(text, encoding="utf-8", newline="\n")


def _jsonl(folder: Path, named: _Named) -> None:
    _copy(folder, named)
    write_jsonl(folder / JSONL, ((name, record.written) for name, record in named), _masks(named))


def _csv(folder: Path, named: _Named) -> None:
    _copy(folder, named)
    write_csv(folder / CSV, ((name, record.written) for name, record in named), _masks(named))


def _parquet(file: Path, named: _Named) -> None:
    cells = [cells_of(record.written) for _, record in named]
    used = dict.fromkeys(column for of in cells for column in of)
    columns = {column: any(len(of.get(column, ())) > 1 for of in cells) for column in used}
    rows = ((name, image_bytes(record.image), record.written) for name, record in named)
    masks = {name: partial(image_bytes, record.mask.image) for name, record in named if record.mask}
    write_parquet(file, rows, columns, masks)


_FORMS: dict[str, _Write] = {"sidecar": _sidecars, "jsonl": _jsonl, "csv": _csv, "parquet": _parquet}


def _copy(folder: Path, named: _Named) -> None:
    masks = _masks(named)
    for name, record in named:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes(record.image))
        if record.mask:
            (folder / masks[name]).write_bytes(image_bytes(record.mask.image))


def _masks(named: _Named) -> dict[str, str]:
    """Return file name -> name of its mask, next to it."""
    masks = ((PurePosixPath(name), record.mask) for name, record in named)
    return {str(name): str(name.with_name(f"{name.stem}_mask{_suffix(mask.image)}")) for name, mask in masks if mask}


def _names(records: Iterable[Record], root: Path, flat: bool) -> Iterator[str]:
    """Yield a file name for each record, its own if it has one; names are unique even if case is ignored.

    With `flat`, names have no folders and differ in more than their suffix, as each image gets its own `.txt`.
    """
    taken: set[str] = set()
    for number, record in enumerate(records):
        wanted = PurePosixPath(_own_name(record.image, root) or f"{number:06}")
        wanted = PurePosixPath("-".join(wanted.parts) if flat else _NOT_UTF8.sub("_", str(wanted)))
        if wanted.suffix.lower() not in EXTENSIONS:
            wanted = wanted.with_name(wanted.name + _suffix(record.image))
        name, copy = wanted, 1
        while _identity(name, flat) in taken:
            copy += 1
            name = wanted.with_stem(f"{wanted.stem}-{copy}")
        taken.add(_identity(name, flat))
        yield name.as_posix()


def _identity(name: PurePosixPath, flat: bool) -> str:
    return str(name.with_suffix("") if flat else name).casefold()


def _own_name(image: ImageRef, root: Path) -> str | None:
    """Return the path relative to `root`, or the file name recorded in a dataset; never one that leaves the folder."""
    if file := file_of(image):
        return file.relative_to(root).as_posix()
    remembered = PurePosixPath((image.file_name if isinstance(image, Row) else None) or "")
    if remembered.is_absolute() or ".." in remembered.parts:
        remembered = PurePosixPath(remembered.name)
    return "/".join(_part(part) for part in remembered.parts) or None


def _part(name: str) -> str:
    """Return a valid file name for a part of a recorded path: not hidden, no control characters, not too long."""
    plain = _CONTROLS.sub("_", name.lstrip(".")) or "_"
    return plain if len(plain.encode()) <= _LONGEST_NAME else plain[-_LONGEST_NAME // 4 :]


def _suffix(image: ImageRef) -> str:
    with Image.open(io.BytesIO(image_bytes(image))) as opened:
        return _SUFFIXES.get(opened.format or "", ".jpg")

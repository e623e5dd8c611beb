"""`metadata.jsonl` and `metadata.csv`: the captions of a folder's files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sd3tune.data.names import Names
from sd3tune.data.written import READERS, Listed, Written, as_written, column_of
from sd3tune.errors import DataError
from sd3tune.files.json import NotJson, parse
from sd3tune.files.regular import complaint, read_regular
from sd3tune.files.text import NotText, decode

JSONL, CSV = "metadata.jsonl", "metadata.csv"
FILE_COLUMN, TEXT_COLUMN = "file_name", "text"
MASK_COLUMN = "mask"
_MASK_COLUMNS = (MASK_COLUMN, "mask_file_name")
"""The second one is `datasets`' name, for a column that its image folders read as images."""
_TEXT_COLUMNS = {name: column_of(name) for name in (TEXT_COLUMN, *READERS)}

_Row = tuple[int, dict[str, Any]]
"""(line number where the row begins, row)."""


@dataclass(frozen=True)
class Rows:
    """The rows of a folder's metadata."""

    captions: dict[Path, Listed] = field(default_factory=dict)
    """File -> captions; None for a row without one."""
    masks: dict[Path, Path] = field(default_factory=dict)
    """File -> its mask, if the row names one."""


def metadata_files(folder: Path, names: Names) -> list[Path]:
    """Return the metadata files of a folder; more than one is an error for `read_metadata`."""
    found = (names.like(folder / name)[:1] for name in (JSONL, CSV))
    return [path for of in found for path in of]


def read_metadata(folder: Path, names: Names, with_masks: bool = True) -> Rows:
    """Return the rows of the folder's metadata; none without metadata.

    A text may be a list of them. Columns besides `text`, `text_clip`, `text_t5` and `mask` are ignored. Raises
    DataError, with a line of the metadata for each problem; for masks only `with_masks`.
    """
    present = metadata_files(folder, names)
    if not present:
        return Rows()
    if len(present) > 1:
        raise DataError(f"{folder}: holds both {JSONL} and {CSV}; keep the one that is meant")
    (path,) = present
    try:
        lines = io.StringIO(decode(read_regular(path), path), newline="")
    except NotText as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(f"{path}: {complaint(error)}") from None
    rows = list(_csv_rows(path, lines) if path.suffix.lower() == ".csv" else _jsonl_rows(path, lines))
    _check_columns(path, rows)
    return _read_rows(path, rows, names, with_masks)


def write_jsonl(path: Path, captions: Iterable[tuple[str, Listed]], masks: Mapping[str, str] = {}) -> None:
    """Write (file name, captions) pairs; several captions become a list. `masks` maps files to their masks."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for name, listed in captions:
            cells = {column: texts[0] if len(texts) == 1 else texts for column, texts in cells_of(listed).items()}
            mask = {MASK_COLUMN: masks[name]} if name in masks else {}
            file.write(json.dumps({FILE_COLUMN: name, **cells, **mask}, ensure_ascii=False) + "\n")


def write_csv(path: Path, captions: Iterable[tuple[str, Listed]], masks: Mapping[str, str] = {}) -> None:
    """Write (file name, captions) pairs; several captions become lines of a cell. `masks` maps files to their masks."""
    rows = [(name, cells_of(listed)) for name, listed in captions]
    columns = [column for column in _TEXT_COLUMNS.values() if any(column in cells for _, cells in rows)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([FILE_COLUMN, *(columns or [TEXT_COLUMN]), *([MASK_COLUMN] if masks else [])])
        for name, cells in rows:
            texts = [as_lines(cells.get(column, ())) for column in columns or [TEXT_COLUMN]]
            writer.writerow([name, *texts, *([masks.get(name, "")] if masks else [])])


def cells_of(listed: Listed) -> dict[str, tuple[str, ...]]:
    """Return column -> texts, for the columns with any."""
    written = as_written(listed)
    return {column: texts for name, column in _TEXT_COLUMNS.items() if (texts := getattr(written, name))}


def as_lines(texts: Sequence[str]) -> str:
    """Return a single text unchanged, and several as lines, for `captions: lines`."""
    return texts[0] if len(texts) == 1 else "\n".join(" ".join(text.split("\n")) for text in texts)


def clean(text: str) -> str:
    """Return a caption in its canonical form: no surrounding whitespace, line breaks as `\\n`."""
    return re.sub(r"\r\n?", "\n", text).strip()


def _jsonl_rows(path: Path, lines: Iterable[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse(line, plain=False)
        except NotJson as error:
            raise DataError(f"{path}:{number}: is not JSON ({error}); a line is one object in braces") from None
        if not isinstance(row, dict):
            raise DataError(f'{path}:{number}: is no object; write {{"{FILE_COLUMN}": ..., "{TEXT_COLUMN}": ...}}')
        yield number, row


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterator[_Row]:
    reader = csv.reader(lines, strict=True)
    begin = 1
    header: list[str] = []
    try:
        for cells in reader:
            number, begin = begin, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
            elif len(cells) != len(header):
                found = f"{len(cells)} column{'s' * (len(cells) != 1)} where the header has {len(header)}"
                raise DataError(f"{path}:{number}: {found}; put a text with commas in double quotes")
            else:
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{begin}: is not CSV ({error})") from None


def _check_columns(path: Path, rows: list[_Row]) -> None:
    if not rows:
        raise DataError(f"{path}: has no rows; fill it or delete it")
    columns = dict.fromkeys(column for _, row in rows for column in row)
    texts = TEXT_COLUMN if columns.keys().isdisjoint([*_TEXT_COLUMNS.values(), *_MASK_COLUMNS]) else None
    for wanted in (FILE_COLUMN, texts):
        if wanted is not None and wanted not in columns:
            raise DataError(f"{path}: has no column {wanted!r}; its columns are {', '.join(columns)}")


def _read_rows(path: Path, rows: list[_Row], names: Names, with_masks: bool) -> Rows:
    read = Rows()
    line_of: dict[Path, int] = {}
    problems = []
    for number, row in rows:
        try:
            file = _file(path.parent, FILE_COLUMN, row.get(FILE_COLUMN), names)
            if file in line_of:
                raise DataError(f"{row[FILE_COLUMN]} was named on line {line_of[file]} already; keep one of them")
            line_of[file] = number
            texts = {name: _texts(row, column) for name, column in _TEXT_COLUMNS.items()}
            read.captions[file] = Written(**texts).plain
            mask = next((cell for column in _MASK_COLUMNS if (cell := row.get(column))), None)
            if mask is not None:
                with contextlib.nullcontext() if with_masks else contextlib.suppress(DataError):
                    read.masks[file] = _file(path.parent, MASK_COLUMN, mask, names)
        except DataError as error:
            problems += [f"{path}:{number}: {problem}" for problem in error.problems]
    if problems:
        raise DataError(*problems)
    return read


def _file(folder: Path, column: str, name: Any, names: Names) -> Path:
    """Return the file that a cell names. Raises DataError for a file that is missing or outside the folder."""
    if column == MASK_COLUMN and not isinstance(name, str):
        raise DataError(f"{column} is {json.dumps(name)[:60]}, not a file's name; or set masks: off")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"has no {column}")
    relative = PurePosixPath(name)
    if relative.is_absolute() or re.match(r"[A-Za-z]:[\\/]", name):
        raise DataError(f"{name} is an absolute path; name files relative to the folder of the metadata")
    if ".." in relative.parts:
        raise DataError(f"{name} leads out of the folder of the metadata; name files inside it")
    file = names.find(folder, relative)
    if file is None or file.is_dir() or not file.exists():
        raise DataError(f"{name} does not exist in {folder}")
    return file


def _texts(row: dict[str, Any], column: str) -> tuple[str, ...]:
    """Return the texts of a cell, without empty ones. Raises DataError."""
    cell = row.get(column)
    texts = cell if isinstance(cell, list) else [] if cell is None else [cell]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{column} is {json.dumps(text)[:60]}, not text; put it in quotes")
    return tuple(cleaned for text in texts if (cleaned := clean(text)))

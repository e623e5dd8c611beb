"""Datasets: their rows as images and captions. The only module that uses the `datasets` library, imported on use.

Images are read as stored bytes, without decoding. So an image has the same digest in a file, in a parquet file and in
a dataset.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3tune.config.sections.data import DatasetSource
from sd3tune.data.images import ImageRef
from sd3tune.data.sources.metadata import MASK_COLUMN, cells_of, clean
from sd3tune.data.sources.row import Row
from sd3tune.data.written import READERS, Listed, Written, column_of
from sd3tune.errors import DataError

_BATCH_BYTES, _BATCH_ROWS = 64 * 2**20, 1000
_SAVED = ("dataset_info.json", "dataset_dict.json")  # written by `save_to_disk`
_WAYS = "a dataset is a .parquet file, a folder, or a Hub id"


def list_rows(source: DatasetSource) -> list[tuple[Row, Listed]]:
    """Return the rows of `list_with_masks`."""
    return list_with_masks(source)[0]


def list_with_masks(source: DatasetSource) -> tuple[list[tuple[Row, Listed]], dict[ImageRef, ImageRef]]:
    """Return all rows of the dataset with their captions, None for a row without one, and row -> its mask.

    Raises DataError.
    """
    place = source.path if source.path.endswith(".parquet") else f"{source.path}:{source.split}"
    dataset = _load(source).with_format(None)
    images = _image_column(dataset, source.image_column, place)
    captions = _captions(dataset, source, place)
    if not len(dataset):
        raise DataError(f"{place}: has no rows")
    folders, loaded = _folders(source), not (source.path.endswith(".parquet") or is_dataset(Path(source.path)))
    rows = [Row(images, source.image_column, place, index, folders, loaded) for index in range(len(captions))]
    masks = _masks(dataset, source, place)
    of_rows: dict[ImageRef, ImageRef] = {
        rows[index]: Row(masks, column, f"{place}:{column}", index, folders, loaded)
        for index in _filled(masks)
        for column in masks.column_names
    }
    return list(zip(rows, (written.plain for written in captions), strict=True)), of_rows


def _folders(source: DatasetSource) -> tuple[Path, ...]:
    """Return a dataset's own folder; for a Hub dataset, the folders of its downloaded and unpacked files."""
    path = Path(source.path)
    if source.path.endswith(".parquet"):
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parent.parts)  # before a pattern
        return (Path(*fixed),)
    if path.is_dir():
        return (path,)
    from datasets import config
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repository = repo_folder_name(repo_id=source.path, repo_type="dataset")
    return Path(constants.HF_HUB_CACHE, repository), Path(config.EXTRACTED_DATASETS_PATH)


def streamed(source: DatasetSource) -> Any:
    """Return the dataset as `datasets` streams it, with images as stored bytes. Raises DataError."""
    datasets, path = _library(), source.path
    try:
        if path.endswith(".parquet"):
            dataset = datasets.load_dataset("parquet", data_files={"train": path}, split="train", streaming=True)
        elif is_dataset(Path(path)):
            raise DataError(f"{path}: is saved on this disk; leave streaming out")
        else:
            dataset = datasets.load_dataset(path, split=source.split, revision=source.revision, streaming=True)
        if dataset.features is None:
            dataset = dataset._resolve_features()
    except DataError:
        raise
    except Exception as error:  # as in `_load`
        raise DataError(f"{path}: {_complaint(error, source, datasets)}") from None
    place = f"{path}:{source.split}"
    _feature(dataset, source.image_column, place, "image_column")
    _readers(dataset, source, place)
    return dataset.cast_column(source.image_column, datasets.Image(decode=False))


def stream_rows(dataset: Any, source: DatasetSource, shard: int) -> Iterator[tuple[bytes | None, dict[str, list[str]]]]:
    """Yield the image of each row of a shard, None if it has none, and its texts by column. Raises DataError."""
    place = f"{source.path}:{source.split}"
    readers = _readers(dataset, source, place)
    try:
        for number, row in enumerate(dataset.shard(num_shards=dataset.num_shards, index=shard)):
            cell = row[source.image_column] or {}
            texts = {column_of(name): [*read(f"{place}[{number}]", row[of])] for name, (of, read) in readers.items()}
            yield cell.get("bytes"), texts
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{place}: {_complaint(error, source, _library())}") from None


def write_parquet(
    path: Path,
    rows: Iterable[tuple[str, bytes, Listed]],
    columns: Mapping[str, bool] = {"text": False},
    masks: Mapping[str, Callable[[], bytes]] = {},
) -> None:
    """Write (file name, image bytes, captions) rows, in parts, to a file that `datasets` reads as images.

    `columns` are the columns of texts, each with True if it holds lists. `masks` maps file names to the bytes of masks.
    """
    import pyarrow
    import pyarrow.parquet

    datasets = _library()
    text = datasets.Value("string")
    features = {name: datasets.List(text) if has_lists else text for name, has_lists in columns.items()}
    of_masks = {MASK_COLUMN: datasets.Image()} if masks else {}
    schema = datasets.Features({"image": datasets.Image(), **features, **of_masks}).arrow_schema
    batch: list[dict[str, Any]] = []
    nbytes = 0
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
            batch.clear()

        for name, data, listed in rows:
            cells = cells_of(listed)
            texts = {column: cells.get(column, ()) for column in columns}
            mask = {MASK_COLUMN: {"bytes": masks[name](), "path": None}} if name in masks else {}
            batch.append(
                {"image": {"bytes": data, "path": name}, **mask}
                | {column: list(of) if columns[column] else of[0] if of else None for column, of in texts.items()}
            )
            nbytes += len(data)
            if nbytes >= _BATCH_BYTES or len(batch) >= _BATCH_ROWS:
                flush()
                nbytes = 0
        if batch:
            flush()


def is_dataset(path: Path) -> bool:
    """Return True if a local file or folder is a dataset, not a folder of images."""
    return path.suffix == ".parquet" or any((path / name).is_file() for name in _SAVED)


def _library() -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # every failure is reported here, in one line
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every attempt to reach the Hub
    return datasets


def _load(source: DatasetSource) -> Any:
    datasets = _library()
    path = source.path
    try:
        if path.endswith(".parquet"):
            if not glob.glob(path) and not os.path.exists(path):
                raise DataError(f"{path}: no such file; check data.sources")
            return datasets.load_dataset("parquet", data_files={"train": path}, split="train")
        if is_dataset(Path(path)):
            saved = datasets.load_from_disk(path)
            if isinstance(saved, datasets.DatasetDict) and source.split not in saved:
                raise DataError(f"{path}: has no split {source.split!r}; set split: it has {', '.join(saved)}")
            return saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        if os.path.isabs(path) and not os.path.isdir(path):
            trouble = "is a file of another kind" if os.path.exists(path) else "no such folder"
            raise DataError(f"{path}: {trouble}; {_WAYS}")
        return datasets.load_dataset(path, split=source.split, revision=source.revision)
    except DataError:
        raise
    except Exception as error:  # loaders raise the errors of many libraries
        raise DataError(f"{path}: {_complaint(error, source, datasets)}") from None


def _complaint(error: Exception, source: DatasetSource, datasets: Any) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    unknown_split = re.match(r"Unknown split .*one of \[(.*)\]", reason)
    if unknown_split:
        return f"has no split {source.split!r}; set split: it has {unknown_split[1].replace(chr(39), '')}"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return (
            f"{_nothing_here(source.path)}, and no such dataset on the Hub, or it is gated or private: see the "
            f"spelling, accept the terms at https://huggingface.co/datasets/{source.path}, and log in: `hf auth login`"
        )
    if isinstance(error, ConnectionError):
        hub = "the Hub cannot be reached: check the network (and HF_HUB_OFFLINE)"
        return f"{_nothing_here(source.path)}; if it is a dataset, {hub}"
    return f"cannot be read as a dataset ({reason}); {_WAYS}"


def _nothing_here(path: str) -> str:
    """Return `no such folder here`, with a folder of a similar name if there is one."""
    parent = Path(path).parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=1)
    return "no such folder here" + (f" (did you mean {parent / near[0]}?)" if near else "")


def _image_column(dataset: Any, column: str, place: str, key: str = "image_column") -> Any:
    """Return the dataset reduced to this column, as stored bytes. `key` is the configuration's, for messages."""
    datasets = _library()
    feature = _feature(dataset, column, place, key)
    stored = isinstance(feature, dict) and "bytes" in feature
    binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    if not (stored or binary or isinstance(feature, datasets.Image)):
        raise DataError(f"{place}: column {column!r} holds {_kind(feature)}, not images; {_columns(dataset)}")
    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _masks(dataset: Any, source: DatasetSource, place: str) -> Any:
    """Return the dataset reduced to its column of masks, as stored bytes; None without one, or if it is not used."""
    datasets = _library()
    if source.masks is not None:
        return None
    column = source.mask_column
    if column is None:
        images = isinstance(dataset.features.get(MASK_COLUMN), datasets.Image)
        column = MASK_COLUMN if images or _is_text(dataset.features.get(MASK_COLUMN)) else None
    if column is None:
        return None
    if _is_text(_feature(dataset, column, place, "mask_column")):
        return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return _image_column(dataset, column, place, "mask_column")


def _filled(column: Any) -> Iterator[int]:
    """Yield the rows whose cell is not empty, without reading the images; none if there is no column."""
    import pyarrow.compute as arrow

    if column is None:
        return
    name, first = column.column_names[0], 0
    for table in column.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        stored, path = (arrow.struct_field(table[name], field) for field in ("bytes", "path"))
        filled = arrow.or_(stored.is_valid(), arrow.not_equal(arrow.fill_null(path, ""), ""))
        yield from (first + place for place, is_filled in enumerate(filled.to_pylist()) if is_filled)
        first += len(filled)


def _captions(dataset: Any, source: DatasetSource, place: str) -> list[Written]:
    """Return the captions of each row. Raises DataError for a column that is missing, or holds something else."""
    found = {
        name: [read(f"{place}[{row}]", cell) for row, cell in enumerate(dataset.select_columns([column])[:][column])]
        for name, (column, read) in _readers(dataset, source, place).items()
    }
    return [Written(**{name: cells[row] for name, cells in found.items()}) for row in range(len(dataset))]


def _readers(dataset: Any, source: DatasetSource, place: str) -> dict[str, tuple[str, _Read]]:
    """Return `Written`'s field -> its column and the function that reads the column. Raises as `_captions` does."""
    configured = {"text": source.caption_column, "clip": source.clip_column, "t5": source.t5_column}
    keys = {"text": "caption_column", "clip": "clip_column", "t5": "t5_column"}
    found = {}
    for name, column in configured.items():
        if column is None and name in READERS and column_of(name) in dataset.features:
            column = column_of(name)
        if column is not None:
            feature = _feature(dataset, column, place, keys[name])
            read = _reader(feature, source.class_names if name == "text" else None)
            if read is None:
                hint = "; set class_names for numbers" * (name == "text" and "int" in _kind(feature))
                raise DataError(
                    f"{place}: column {column!r} holds {_kind(feature)}, not text{hint}; {_columns(dataset)}"
                )
            found[name] = column, read
    return found


_Read = Callable[[str, Any], tuple[str, ...]]
"""(row in messages, cell) -> its texts, without empty ones."""


def _reader(feature: Any, class_names: Sequence[str] | None) -> _Read | None:
    """Return the function that reads a column's cells; None for a column without texts."""
    datasets = _library()
    dtype = str(getattr(feature, "dtype", ""))
    if dtype.removeprefix("u").startswith("int") and (class_names or isinstance(feature, datasets.ClassLabel)):
        names = class_names or feature.names
        return lambda row, cell: _class_name(row, names, cell)
    if _is_text(feature):
        return lambda row, cell: _cleaned([cell])
    inside = getattr(feature, "feature", None) or (feature[0] if isinstance(feature, list) and feature else None)
    return (lambda row, cell: _cleaned(cell or ())) if _is_text(inside) else None


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _cleaned(texts: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(cleaned for text in texts if (cleaned := clean(text or "")))


def _class_name(row: str, names: Sequence[str], label: int | None) -> tuple[str, ...]:
    """Return the class name of a label, if any; `datasets` uses -1 for a row without one. Raises DataError."""
    if label is None or label < 0:
        return ()
    if label >= len(names):
        raise DataError(f"{row}: has the class {label}, and class_names ends at {len(names) - 1}; add its name")
    return _cleaned([names[label]])


def _feature(dataset: Any, column: str, place: str, key: str) -> Any:
    if column not in dataset.features:
        raise DataError(f"{place}: has no column {column!r}; set {key}: {_columns(dataset)}")
    return dataset.features[column]


def _columns(dataset: Any) -> str:
    return f"the columns are {', '.join(dataset.column_names)}"


def _kind(feature: Any) -> str:
    dtype = getattr(feature, "dtype", None)
    return dtype if isinstance(dtype, str) and type(feature).__name__ == "Value" else type(feature).__name__

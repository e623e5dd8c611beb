"""The rows of an evaluation: each figure's mean with its interval, its share, and its difference to the base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd3tune.evaluation.measuring import PHOTOS_ROW, SUBJECT, Key, Measured
from sd3tune.evaluation.pictures import BASE_ROW
from sd3tune.measures.intervals import Interval, interval, paired, share


@dataclass(frozen=True)
class Figure:
    """One figure of a row."""

    interval: Interval
    share: float | None = None
    """For likeness: 0 is the base's, 1 the photos' own; None if either is missing."""
    against_base: Interval | None = None
    """The difference to the base at the same prompts and seeds."""


@dataclass(frozen=True)
class RowName:
    """A row that has pictures."""

    name: str
    kind: str
    """`base`, `trained` or `folder`."""
    step: int | None = None


@dataclass(frozen=True)
class Row:
    """The figures of the photos, of the base, of some weights, or of a folder."""

    name: str
    kind: str
    """`photos`, `base`, `trained` or `folder`."""
    step: int | None
    figures: Mapping[Key, Figure]
    copies: int | None = None
    """Number of pictures that copy a training photo, by the first encoder; None if not measured."""
    pictures: int = 0


def rows_of(measured: Measured, names: Sequence[RowName]) -> list[Row]:
    """Return a row for the photos, then one for each name."""
    base = tables_of(measured, BASE_ROW)
    photos = _photos_row(measured, base)
    rows = [photos]
    for own in names:
        tables = tables_of(measured, own.name)
        figures = {}
        for key, table in tables.items():
            with_base = own.kind == "trained" and key in base and base[key].shape == table.shape
            figures[key] = Figure(
                interval(table),
                _share(key, table, base, photos),
                paired(table, base[key]) if with_base else None,
            )
        count = sum(picture.row == own.name for picture in measured.pictures)
        rows.append(Row(own.name, own.kind, own.step, figures, copies_of(measured, own.name), count))
    return rows


def _photos_row(measured: Measured, base: Mapping[Key, Tensor]) -> Row:
    keys = dict.fromkeys(key for values in measured.photo_values for key in values)
    figures = {
        key: Figure(
            interval(torch.tensor([[values[key]] for values in measured.photo_values if key in values])),
            1.0 if key[0] == SUBJECT and key in base else None,
        )
        for key in keys
    }
    for (row, key), values in measured.by_prompt.items():
        if row == PHOTOS_ROW:
            figures[key] = Figure(interval(torch.tensor([[value] for value in values])))
    return Row(PHOTOS_ROW, "photos", None, figures, pictures=len(measured.photo_values))


def tables_of(measured: Measured, row: str) -> dict[Key, Tensor]:
    """Return each measure of a row as a table [prompts, seeds], NaN where a value is missing."""
    mine = [
        (picture, values)
        for picture, values in zip(measured.pictures, measured.values, strict=True)
        if picture.row == row
    ]
    tables: dict[Key, Tensor] = {}
    for key in dict.fromkeys(key for _, values in mine for key in values):
        having = [(picture, values[key]) for picture, values in mine if key in values]
        prompts = _places(picture.number for picture, _ in having)
        widest: dict[int, dict[int, int]] = {}
        for picture, _ in having:
            seeds = widest.setdefault(picture.number, {})
            seeds.setdefault(picture.seed, len(seeds))
        table = torch.full((len(prompts), max(map(len, widest.values()))), torch.nan, dtype=torch.float64)
        for picture, value in having:
            table[prompts[picture.number], widest[picture.number][picture.seed]] = value
        tables[key] = table
    for (owner, key), by_prompt in measured.by_prompt.items():
        if owner == row:
            tables[key] = torch.tensor([[value] for value in by_prompt], dtype=torch.float64)
    return tables


def _places(values: Iterable[int]) -> dict[int, int]:
    return {value: place for place, value in enumerate(dict.fromkeys(values))}


def _share(key: Key, table: Tensor, base: Mapping[Key, Tensor], photos: Row) -> float | None:
    ceiling = photos.figures.get(key)
    if key[0] != SUBJECT or ceiling is None or key not in base:
        return None
    value = share(interval(table, samples=1).mean, interval(base[key], samples=1).mean, ceiling.interval.mean)
    return None if math.isnan(value) else value


def copies_of(measured: Measured, row: str) -> int | None:
    """Return the number of a row's pictures that copy a photo, by the first encoder; None if not measured."""
    first = next((name for index, name in measured.copies), None)
    if first is None:
        return None
    mine = [index for index, picture in enumerate(measured.pictures) if picture.row == row]
    return sum(measured.copies.get((index, first), False) for index in mine)

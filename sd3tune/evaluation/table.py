"""The table of an evaluation, as text for a terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sd3tune.evaluation.measuring import (
    CLASS_SUBJECT,
    DIVERSITY,
    HELD_OUT,
    MOVED,
    NEAREST,
    PROMPT,
    SUBJECT,
)
from sd3tune.evaluation.rows import Figure, Row
from sd3tune.measures.intervals import Interval

TITLES = {
    SUBJECT: "likeness",
    HELD_OUT: "held out",
    PROMPT: "prompt",
    DIVERSITY: "diversity",
    NEAREST: "nearest",
    CLASS_SUBJECT: "class",
    MOVED: "moved",
}
"""Measure -> its column's title, in the order of the columns."""
_SHARE = "share"
_NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A column: a measure by an encoder, or the share of the likeness before it."""

    measure: str
    encoder: str
    is_share: bool = False

    @property
    def title(self) -> str:
        return _SHARE if self.is_share else TITLES[self.measure]

    def cell(self, row: Row, shown: Callable[[Interval], str]) -> str:
        """Return the text of a row's figure; `shown` writes an interval."""
        figure = row.figures.get((self.measure, self.encoder))
        if figure is None or (self.is_share and figure.share is None):
            return _NOTHING
        return f"{figure.share:.2f}" if self.is_share else shown(figure.interval)


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Return the columns that at least one row fills, ordered by measure, then by encoder as measured."""
    keys = dict.fromkeys(key for row in rows for key in row.figures)
    columns = []
    for measure in TITLES:
        for encoder in (encoder for of, encoder in keys if of == measure):
            columns.append(Column(measure, encoder))
            if any(_figure(row, measure, encoder).share is not None for row in rows):
                columns.append(Column(measure, encoder, is_share=True))
    return columns


def text_table(rows: Sequence[Row]) -> list[str]:
    """Return the table as lines: titles, encoders, then a line for each row, `mean ±half of the interval`."""
    columns = columns_of(rows)
    lines = [["", *(column.title for column in columns)], ["", *(_by(column) for column in columns)]]
    lines += [[row.name, *(column.cell(row, _half) for column in columns)] for row in rows]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    return ["  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def markdown_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows for a Markdown table: `mean (low to high)`."""
    columns = columns_of(rows)
    header = ["", *(f"{column.title} {_by(column)}".strip() for column in columns)]
    return header, [[row.name, *(column.cell(row, _ends) for column in columns)] for row in rows]


def _by(column: Column) -> str:
    return "" if column.is_share else column.encoder


def _figure(row: Row, measure: str, encoder: str) -> Figure:
    return row.figures.get((measure, encoder), _NO_FIGURE)


def _half(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ±{(interval.high - interval.low) / 2:.3f}"


def _ends(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


_NO_FIGURE = Figure(Interval(math.nan, math.nan, math.nan, 0))

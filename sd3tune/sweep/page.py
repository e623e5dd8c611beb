"""`sweep.html`: the table, and a plot of the objective over each axis and over the trials."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.files.atomic import write_text
from sd3tune.html_report.frame import rendered
from sd3tune.sweep.results import best_row, ranked, shown
from sd3tune.sweep.settings import Range, Sweep
from sd3tune.sweep.trials import Row

PAGE = "sweep.html"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 240, 62, 12, 12, 34
"""Pixels of a plot, and of its margins."""


@dataclass(frozen=True)
class Tick:
    place: float
    text: str


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    text: str
    """The trial in words."""
    is_best: bool


@dataclass(frozen=True)
class Plot:
    """A plot in pixels, from the upper left corner."""

    title: str
    across: Sequence[Tick]
    up: Sequence[Tick]
    points: Sequence[Point]


def write_page(folder: Path, rows: Sequence[Row], sweep: Sweep) -> Path:
    """Write the page, which needs no network."""
    best = best_row(rows, sweep)
    values = [dict(text.split("=", 1) for text in row.overrides) for row in ranked(rows, sweep)]
    texts = {
        "title": sweep.name,
        "objective": sweep.objective,
        "direction": "lowest" if sweep.minimises else "highest",
        "keys": list(sweep.axes),
        "best": best and best.name,
        "rows": [
            (row.name, row.state, [shown(of.get(key, "-")) for key in sweep.axes], row.value, row.step, row.reason)
            for row, of in zip(ranked(rows, sweep), values, strict=True)
        ],
        "charts": [],
    }
    size = {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
    }
    drawn = {"plots": plots(rows, sweep), "size": size}
    write_text(folder / PAGE, rendered("sweep.html.jinja", texts, drawn, scripts=()))
    return folder / PAGE


def plots(rows: Sequence[Row], sweep: Sweep) -> list[Plot]:
    """Return plots of the objective over the trial's number and over each axis; none without a complete trial."""
    complete, best = [row for row in rows if row.value is not None], best_row(rows, sweep)
    if not complete:
        return []
    numbers = [float(row.number) for row in complete]
    found = [_plot("trial", numbers, _scale(0, max(1, *(row.number for row in rows))), complete, best)]
    for key, axis in sweep.space.items():
        texts = [dict(text.split("=", 1) for text in row.overrides)[key] for row in complete]
        scale = _scale_of(axis)
        places = [float(text) if scale.names is None else float(scale.names.index(text)) for text in texts]
        found.append(_plot(key, places, scale, complete, best))
    return found


@dataclass(frozen=True)
class _Scale:
    """From a value to a share of the width."""

    low: float
    high: float
    log: bool = False
    names: list[str] | None = None

    def share(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        if self.names is not None:
            return [(number, shown(name)[:14]) for number, name in enumerate(self.names)]
        shares = (0.0, 0.25, 0.5, 0.75, 1.0)
        if self.log:
            return [(value, f"{value:.2g}") for value in (self.low * (self.high / self.low) ** one for one in shares)]
        return [(value, f"{value:.4g}") for value in (self.low + (self.high - self.low) * one for one in shares)]


def _scale(low: float, high: float, log: bool = False) -> _Scale:
    """Return a scale; a single value lies in its middle."""
    if low == high:
        margin = abs(low) / 10 or 1.0
        return _Scale(low - margin, high + margin)
    return _Scale(low, high, log)


def _scale_of(axis: list[Any] | Range) -> _Scale:
    if not isinstance(axis, list) and axis.step is None:
        return _scale(axis.low, axis.high, axis.log)
    listed = axis if isinstance(axis, list) else axis.values
    names = [json.dumps(value, ensure_ascii=False) for value in listed]
    return _Scale(-0.5, len(names) - 0.5, names=names)


def _plot(title: str, places: Sequence[float], across: _Scale, rows: Sequence[Row], best: Row | None) -> Plot:
    values = [row.value for row in rows if row.value is not None]
    up = _scale(min(values), max(values))
    x = [LEFT + across.share(place) * (WIDTH - LEFT - RIGHT) for place in places]
    y = [HEIGHT - BOTTOM - up.share(value) * (HEIGHT - TOP - BOTTOM) for value in values]
    words = [f"{row.name}: {' '.join(row.overrides)}: {row.value:.6g}" for row in rows]
    return Plot(
        title,
        [Tick(LEFT + across.share(value) * (WIDTH - LEFT - RIGHT), text) for value, text in across.ticks],
        [Tick(HEIGHT - BOTTOM - up.share(value) * (HEIGHT - TOP - BOTTOM), text) for value, text in up.ticks],
        [Point(right, down, text, row is best) for right, down, text, row in zip(x, y, words, rows, strict=True)],
    )

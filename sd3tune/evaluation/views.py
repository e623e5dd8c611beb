"""The pictures of an evaluation to look at: contact sheets, and a plot of likeness against drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from sd3tune.data.images import ImageRef, open_image
from sd3tune.evaluation.measuring import CLASS_SUBJECT, PHOTOS_ROW, PIXELS, SUBJECT, Measured
from sd3tune.evaluation.pictures import BASE_ROW, SCORED, Picture
from sd3tune.evaluation.rows import Row
from sd3tune.measures.intervals import Interval
from sd3tune.sampling.contact_sheet import contact_sheet

_MOST_ROWS, _MOST_SEEDS, _SIDE = 12, 3, 192
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 760, 520, 70, 20, 150, 60
_LABEL_WIDTH, _LABEL_HEIGHT = 80, 15
_GREY, _BLUE = "#888888", "#1f5fbf"


def nearest_sheet(measured: Measured, row: str, photos: Sequence[ImageRef], encoder: str) -> Image.Image:
    """Return a sheet of a row's pictures, each beside its nearest training photo; a line for each prompt."""
    by_prompt: dict[int, list[int]] = {}
    for index, picture in enumerate(measured.pictures):
        if picture.row == row and picture.kind == SCORED:
            by_prompt.setdefault(picture.number, []).append(index)
    lines, labels = list[list[Image.Image | None]](), list[str]()
    for indices in list(by_prompt.values())[:_MOST_ROWS]:
        cells: list[Image.Image | None] = []
        for index in indices[:_MOST_SEEDS]:
            place = measured.nearest_photo.get((index, encoder), measured.nearest_photo.get((index, PIXELS)))
            cells += [open_image(measured.pictures[index].file), None if place is None else open_image(photos[place])]
        lines.append(cells)
        labels.append(measured.pictures[indices[0]].prompt or row)
    columns = [text for seed in range(_MOST_SEEDS) for text in (f"{row}, seed {seed}", "nearest photo")]
    return contact_sheet(lines, columns[: max(map(len, lines))], labels, side=_SIDE)


def checkpoints_sheet(measured: Measured, rows: Sequence[Row]) -> Image.Image:
    """Return a sheet with the first picture of each prompt, a column for each row that was drawn."""
    names = [row.name for row in rows if row.name != PHOTOS_ROW]
    first: dict[tuple[int, str], Picture] = {}
    for picture in measured.pictures:
        if picture.kind == SCORED:
            first.setdefault((picture.number, picture.row), picture)
    numbers = sorted({number for number, _ in first})[:_MOST_ROWS]
    lines = [
        [open_image(first[number, name].file) if (number, name) in first else None for name in names]
        for number in numbers
    ]
    labels = [next(of.prompt or "" for (at, _), of in first.items() if at == number) for number in numbers]
    return contact_sheet(lines, names, labels, side=_SIDE)


def drift_plot(rows: Sequence[Row], encoder: str) -> Image.Image | None:
    """Return a plot of likeness (up) against the likeness of class prompts (right), a point for each row.

    Both are best at the upper left. The lines of a cross are the intervals. None without class prompts.
    """
    points = {
        row.name: (row.figures[CLASS_SUBJECT, encoder].interval, row.figures[SUBJECT, encoder].interval)
        for row in rows
        if (CLASS_SUBJECT, encoder) in row.figures and (SUBJECT, encoder) in row.figures
    }
    if set(points) <= {BASE_ROW}:
        return None
    photos = next((row for row in rows if row.name == PHOTOS_ROW), None)
    ceiling = (
        photos.figures[SUBJECT, encoder].interval.mean if photos and (SUBJECT, encoder) in photos.figures else None
    )
    plot = _Plot([x for x, _ in points.values()], [y for _, y in points.values()], ceiling)
    plot.axes(f"class prompts: likeness to the photos ({encoder})", "likeness of the subject")
    if ceiling is not None:
        plot.level(ceiling, "photos among themselves")
    plot.points(points)
    return plot.image


class _Plot:
    """A scatter plot with intervals."""

    def __init__(self, across: Sequence[Interval], up: Sequence[Interval], level: float | None) -> None:
        self.image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
        self._draw = ImageDraw.Draw(self.image)
        self._font = ImageFont.load_default(size=13)
        self._labels: list[tuple[float, float]] = []
        self._across = _limits(across, None)
        self._up = _limits(up, level)

    def axes(self, across: str, up: str) -> None:
        left, bottom = _LEFT, _HEIGHT - _BOTTOM
        self._draw.line([(left, _TOP), (left, bottom), (_WIDTH - _RIGHT, bottom)], fill="black")
        for part in range(5):
            x = self._across[0] + part / 4 * (self._across[1] - self._across[0])
            y = self._up[0] + part / 4 * (self._up[1] - self._up[0])
            self._text((self._x(x), bottom + 6), f"{x:.2f}", "mt")
            self._text((left - 6, self._y(y)), f"{y:.2f}", "rm")
        self._text(((left + _WIDTH - _RIGHT) / 2, _HEIGHT - 22), across, "mt")
        self._text((left + 8, _TOP), up, "lt")

    def level(self, y: float, label: str) -> None:
        self._draw.line([(_LEFT, self._y(y)), (_WIDTH - _RIGHT, self._y(y))], fill=_GREY)
        self._text((_WIDTH - _RIGHT - 4, self._y(y) + 3), label, "rt", _GREY)

    def points(self, points: Mapping[str, tuple[Interval, Interval]]) -> None:
        """Draw a cross for each row, and connect the trained ones in their order."""
        trained = [(self._x(x.mean), self._y(y.mean)) for name, (x, y) in points.items() if name != BASE_ROW]
        if len(trained) > 1:
            self._draw.line(trained, fill="#b8cbea", width=2)
        for name, (x, y) in points.items():
            colour, at = (_GREY if name == BASE_ROW else _BLUE), (self._x(x.mean), self._y(y.mean))
            if x.low <= x.high:
                self._draw.line([(self._x(x.low), at[1]), (self._x(x.high), at[1])], fill=colour)
            if y.low <= y.high:
                self._draw.line([(at[0], self._y(y.low)), (at[0], self._y(y.high))], fill=colour)
            self._draw.ellipse([at[0] - 4, at[1] - 4, at[0] + 4, at[1] + 4], fill=colour)
            self._label(at, name, colour)

    def _label(self, at: tuple[float, float], name: str, colour: str) -> None:
        """Write a name beside its point, below the names that are there already."""
        x, y = at[0] + 8, at[1] - 20
        while any(abs(x - left) < _LABEL_WIDTH and abs(y - top) < _LABEL_HEIGHT for left, top in self._labels):
            y += _LABEL_HEIGHT
        self._labels.append((x, y))
        self._text((x, y), name, "lt", colour)

    def _x(self, value: float) -> float:
        low, high = self._across
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        low, high = self._up
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def _text(self, at: tuple[float, float], text: str, anchor: str, fill: str = "black") -> None:
        self._draw.text(at, text, fill=fill, font=self._font, anchor=anchor)


def _limits(intervals: Sequence[Interval], also: float | None) -> tuple[float, float]:
    """Return limits that hold all intervals, with a margin; the ends of an interval may be NaN."""
    values = [value for one in intervals for value in (one.mean, one.low, one.high) if value == value]
    values += [] if also is None else [also]
    margin = max(0.1 * (max(values) - min(values)), 0.01)
    return min(values) - margin, max(values) + margin

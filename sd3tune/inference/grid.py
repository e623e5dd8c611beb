"""Grids: one contact sheet of many images, with one parameter per axis."""

from __future__ import annotations

import difflib
import glob
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sd3tune.errors import ConfigError
from sd3tune.inference.checks import problems_of
from sd3tune.inference.image_request import PARAMETERS, ImageRequest
from sd3tune.inference.lora_argument import parse_lora
from sd3tune.sampling.contact_sheet import contact_sheet

_FIELDS = {name: parameter for name, parameter in PARAMETERS.items() if parameter.axis}
AXES = ("weight", "lora", *_FIELDS)
"""`weight` and `lora` change the adapters of a request, the others the field of their name."""
MOST_AXES = 2


@dataclass(frozen=True)
class Axis:
    """A name of `AXES` and its values: for `lora` pairs (adapter index, weight), else values of the field."""

    name: str
    values: Sequence[Any]
    labels: Sequence[str]

    def apply(self, request: ImageRequest, place: int) -> ImageRequest:
        value = self.values[place]
        return _CHANGES.get(self.name, _with_field)(request, self.name, value)

    def label(self, place: int) -> str:
        return self.labels[place] if self.name in ("prompt", "lora") else f"{self.name} {self.labels[place]}"


@dataclass(frozen=True)
class Grid:
    """Columns, and rows if there is a second axis."""

    axes: Sequence[Axis]
    loras: Sequence[str] = ()
    """The adapters of a `lora` axis, in its order; in a session they follow the adapters of `--lora`."""

    def requests(self, first: ImageRequest) -> list[list[ImageRequest]]:
        """Return the requests by row and column, each named after its cell."""
        ordered = sorted(enumerate(self.axes), key=lambda axis: axis[1].name == "weight")  # after its adapter is set
        columns, rows = (range(len(axis.values)) for axis in (*self.axes, _SINGLE)[:2])

        def cell(*places: int) -> ImageRequest:
            changed = first
            for number, axis in ordered:
                changed = axis.apply(changed, places[number])
            labels = [
                f"-{axis.name}-{_slug(axis.labels[place])}"
                for axis, place in zip(self.axes, places, strict=False)
                if axis.name not in ("prompt", "seed")  # prompt and seed are part of every name
            ]
            return replace(changed, name=changed.stem + "".join(labels))

        return [[cell(column, row) for column in columns] for row in rows]

    def sheet(self, images: Sequence[Sequence[Image.Image]]) -> Image.Image:
        """Return the labelled contact sheet of `images[row][column]`."""
        columns, *rows = ([axis.label(place) for place in range(len(axis.values))] for axis in self.axes)
        side = min(512, max(128, *images[0][0].size))
        return contact_sheet(images, columns, rows[0] if rows else (), side)


def read_grid(axes: Sequence[str], fixed: Sequence[str]) -> Grid | None:
    """Return the grid of `NAME=VALUE,VALUE,...` texts, with the adapters `fixed` in all cells; None without texts.

    Raises ConfigError with a line for each problem.
    """
    if not axes:
        return None
    if len(axes) > MOST_AXES:
        raise ConfigError(f"--grid: {len(axes)} axes; a picture has {MOST_AXES}")
    split = [_split(text) for text in axes]
    names = [name for name, _ in split]
    if len(set(names)) < len(names):
        raise ConfigError(f"--grid {names[0]}: given twice; put all its values into one, separated by commas")
    if "weight" in names and "lora" not in names and not fixed:
        raise ConfigError("--grid weight: there is no adapter; give --lora")
    named = [value for name, values in split if name == "lora" for value in values]
    loras = [one for value in named for one in _expanded(value)]
    return Grid([_axis(name, values, loras, len(fixed)) for name, values in split], loras)


def _split(text: str) -> tuple[str, list[str]]:
    """Split `NAME=VALUE,VALUE` into name and values; at `|` if there is one, so that a prompt may contain commas."""
    name, equals, values = text.partition("=")
    if name not in AXES:
        close = difflib.get_close_matches(name, AXES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(AXES)}"
        raise ConfigError(f"--grid {name}: no such axis; {hint}")
    parts = [value.strip() for value in values.split("|" if "|" in values else ",")]
    if not equals or not all(parts):
        raise ConfigError(f"--grid {text}: write NAME=VALUE,VALUE such as weight=0,0.5,1")
    return name, list(dict.fromkeys(parts))


def _axis(name: str, values: Sequence[str], loras: Sequence[str], fixed: int) -> Axis:
    if name == "lora":
        adapters = [parse_lora(lora, "--grid lora=") for lora in loras]
        numbered = [(fixed + number, weight) for number, (_, weight) in enumerate(adapters)]
        return Axis(name, numbered, [_short(path) for path, _ in adapters])
    try:
        parsed: list[Any] = [_FIELDS[name].reader(value) if name in _FIELDS else float(value) for value in values]
    except ValueError as error:
        expected = "a number" if name == "weight" else error
        raise ConfigError(f"--grid {name}={','.join(values)}: each value is {expected}") from None
    if name == "weight":
        problems = [f"--grid weight={value}: a finite number" for value in parsed if not math.isfinite(value)]
    else:
        requests = [ImageRequest(**{name: value}) for value in parsed]
        problems = [line for request in requests for line in problems_of(request, lambda name: f"--grid {name}")]
    if problems:
        raise ConfigError(*problems)
    return Axis(name, parsed, values)


def _expanded(value: str) -> list[str]:
    """Expand a pattern such as `runs/x/checkpoints/*`, or a run's folder of checkpoints, into the paths that match."""
    pattern = f"{value}/step-*" if Path(value).name == "checkpoints" else value
    if not glob.has_magic(pattern):
        return [value]
    matches = sorted(glob.glob(pattern))
    if not matches:
        raise ConfigError(f"--grid lora={value}: finds nothing")
    return matches


def _short(path: Path) -> str:
    parts = [part for part in path.parts if part not in ("adapter", "/", "..", ".")]
    return parts[-1].removesuffix(".safetensors") if parts else str(path)


def _slug(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", label)


def _with_field(request: ImageRequest, name: str, value: Any) -> ImageRequest:
    return replace(request, **{name: value})


def _with_lora(request: ImageRequest, _: str, value: tuple[int, float]) -> ImageRequest:
    return replace(request, loras=(value, *request.loras))


def _with_weight(request: ImageRequest, _: str, value: float) -> ImageRequest:
    """Set the weight of the first adapter: the `lora` axis' if there is one, otherwise the first `--lora`."""
    return replace(request, loras=((request.loras[0][0], value), *request.loras[1:]))


_CHANGES: dict[str, Callable[[ImageRequest, str, Any], ImageRequest]] = {"lora": _with_lora, "weight": _with_weight}
_SINGLE = Axis("", [None], [""])

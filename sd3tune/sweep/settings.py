"""The settings of a sweep, and their file: what is trained, over which axes, and what is compared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from sd3tune.config.files import read_text
from sd3tune.config.problems import dotted, explain
from sd3tune.config.sections.section import Section
from sd3tune.config.yaml12 import Document, KeyPath, YamlError, parse
from sd3tune.errors import ConfigError

VALIDATION_LOSS = "validation_loss"
Objective = Literal["validation_loss", "likeness", "share", "prompt", "diversity"]
_OWN_KEYS = ("name", "output_dir")
"""Keys that differ between the trials anyway."""


class Range(Section):
    """An axis of numbers between two bounds; of whole numbers if both bounds are."""

    low: int | float = Field(description="Lowest value.")
    high: int | float = Field(description="Highest value.")
    log: bool = Field(False, description="Draw evenly on a logarithmic scale.")
    step: int | float | None = Field(None, gt=0, description="Distance of the values from `low` on; null: any value.")

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    @property
    def values(self) -> list[int | float]:
        """The values of a range with a `step`, from `low` on."""
        if self.step is None:
            return []
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        found = (self.low + number * self.step for number in range(count))
        return [value if isinstance(value, int) else float(f"{value:.12g}") for value in found]


class Pruning(Section):
    """Stop trials whose measurements so far are worse than the median of the others at the same step."""

    kind: Literal["median"] = Field("median", description="The rule.")
    after_trials: int = Field(4, ge=0, description="Number of finished trials before any is stopped.")
    after_steps: int = Field(0, ge=0, description="Steps of a trial before it can be stopped.")


class Sweep(Section):
    """A sweep: trainings of one configuration that differ in the keys of `axes`."""

    config: str = Field(
        min_length=1, description="The YAML of the training, relative to this file.", examples=["train.yaml"]
    )
    name: str = Field(
        "sweep",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="Name of the sweep, in its folder and storage.",
    )
    output_dir: str | None = Field(
        None, min_length=1, description="Folder of the trials, relative to this file; null: `runs/{name}`."
    )
    axes: dict[str, Any] = Field(
        min_length=1,
        description="Key of the training -> list of values, or `{low, high, log, step}`.",
        examples=["{optimizer.lr: [1e-4, 3e-4]}"],
    )
    sampler: Literal["grid", "random", "tpe"] = Field(
        "grid", description="`grid`: every combination; `random`; `tpe`: learn from the finished trials."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the sampler.")
    trials: int | None = Field(None, ge=1, le=10_000, description="Number of trials; null: all of a grid.")
    objective: Objective = Field(
        "validation_loss", description="What is compared: the lowest held-out loss, or a figure of `eval` at its best."
    )
    direction: Literal["minimize", "maximize"] | None = Field(
        None, description="null: a loss is minimised, a figure of `eval` maximised."
    )
    pruning: Pruning | None = Field(None, description="Stop bad trials early; null never does, `{}` does.")
    workers: int = Field(1, ge=1, le=256, description="Trials at once on this machine.")
    gpus: list[int] = Field(
        default=[], description="GPU of each worker, for CUDA_VISIBLE_DEVICES; empty: all workers see the same."
    )
    max_failed: int = Field(3, ge=0, description="Failed trials that are passed over; one more ends the sweep.")
    storage: str | None = Field(
        None, min_length=1, description="Database, as a URL of SQLAlchemy; null: `sweep.db` in the folder."
    )

    @field_validator("config", "output_dir", "storage")
    @classmethod
    def _one_line(cls, text: str | None) -> str | None:
        if text is not None and "\0" in text:
            raise ValueError("holds a NUL character")
        return text

    @property
    def minimises(self) -> bool:
        return self.direction == "minimize" if self.direction else self.objective == VALIDATION_LOSS

    @property
    def space(self) -> dict[str, list[Any] | Range]:
        """Key -> its values, or their range."""
        return {key: axis if isinstance(axis, list) else Range(**axis) for key, axis in self.axes.items()}

    @property
    def grid_size(self) -> int:
        """Number of combinations; 0 if a range without `step` has no end of them."""
        size = 1
        for axis in self.space.values():
            size *= len(axis if isinstance(axis, list) else axis.values)
        return size

    @property
    def count(self) -> int:
        """Number of trials."""
        return self.grid_size if self.trials is None else self.trials


@dataclass(frozen=True)
class SweepFile:
    """A checked file of settings."""

    source: str
    settings: Sweep
    lines: dict[KeyPath, int]

    def at(self, *path: str | int) -> str:
        """Return `FILE:LINE: KEY`, the start of a message about a key."""
        return f"{_label(self.source, self.lines, path)}: {dotted(path)}"

    @property
    def config(self) -> Path:
        """The configuration of the training."""
        return _beside(self.source, self.settings.config)

    @property
    def folder(self) -> Path:
        """The folder of the trials."""
        if self.settings.output_dir is None:
            return Path.cwd() / "runs" / self.settings.name
        return _beside(self.source, self.settings.output_dir)


def read_sweep(path: str | os.PathLike[str]) -> SweepFile:
    """Read and check a sweep's file. Raises ConfigError, one line per problem: `sweep.yaml:7: trials: ...`."""
    source = os.fspath(path)
    document = _document(source)
    problems = [(path, message) for path, _, message in document.problems]
    settings = None
    try:
        settings = Sweep.model_validate(document.value)
    except ValidationError as error:
        problems += explain(error.errors(include_url=False), document.value, Sweep)
    axes = document.value.get("axes")
    if isinstance(axes, dict):
        problems += [(("axes", key, *path), message) for key, axis in axes.items() for path, message in _axis(axis)]
        problems += [(("axes", key), "each trial has its own already; remove it") for key in axes if key in _OWN_KEYS]
    if settings is None or problems:
        raise ConfigError(*(_line(source, document.lines, *problem) for problem in problems))
    problems += _contradictions(settings)
    if problems:
        raise ConfigError(*(_line(source, document.lines, *problem) for problem in problems))
    return SweepFile(source, settings, document.lines)


def _document(source: str) -> Document:
    try:
        document = parse(read_text(source))
    except YamlError as error:
        raise ConfigError(f"{source}:{error.line}: {error.message}") from None
    if not isinstance(document.value, dict):
        raise ConfigError(f"{source}: a sweep consists of lines such as `config: train.yaml`, and names its axes")
    return document


def _axis(axis: Any) -> Iterator[tuple[KeyPath, str]]:
    """Yield the problems of an axis."""
    if isinstance(axis, list):
        texts = [json.dumps(value) for value in axis]
        if len(set(texts)) < len(texts):
            yield (), "lists a value twice; remove one of them"
        if not axis:
            yield (), "is an empty list; give at least one value"
        return
    if not isinstance(axis, dict):
        yield (), "is neither a list of values nor a range such as {low: 1e-5, high: 1e-3, log: true}"
        return
    try:
        found = Range.model_validate(axis)
    except ValidationError as error:
        yield from explain(error.errors(include_url=False), axis, Range)
        return
    if found.low >= found.high:
        yield ("high",), f"{found.high:g} is not above low, which is {found.low:g}"
    elif found.log and (found.low <= 0 or found.step is not None):
        yield ("log",), "needs a low above 0, and no step; set log: false, or change them"


def _contradictions(settings: Sweep) -> Iterator[tuple[KeyPath, str]]:
    """Yield the problems of keys that do not fit each other."""
    for key, axis in settings.space.items():
        if settings.sampler == "grid" and not isinstance(axis, list) and axis.step is None:
            yield ("axes", key), "a grid needs a step, or a list of values; or set sampler: random"
            return
    if settings.sampler != "grid" and settings.trials is None:
        yield ("sampler",), f"{settings.sampler} needs a number of trials, such as trials: 20"
    if settings.sampler == "grid" and (settings.trials or 0) > settings.grid_size:
        yield ("trials",), f"the grid has {settings.grid_size} combinations; leave trials out, or lower it"
    if settings.sampler == "grid" and settings.count > 10_000:
        yield ("axes",), f"the grid has {settings.count} combinations, and 10000 are the limit; set sampler: random"
    if settings.gpus and len(settings.gpus) < settings.workers:
        yield ("gpus",), f"has {len(settings.gpus)} for {settings.workers} workers; give each worker one"


def _line(source: str, lines: dict[KeyPath, int], path: KeyPath, message: str) -> str:
    return f"{_label(source, lines, path)}: {f'{dotted(path)}: ' if path else ''}{message}"


def _label(source: str, lines: dict[KeyPath, int], path: Sequence[str | int]) -> str:
    """Return `FILE:LINE` of a key, or of the nearest one around it; the file alone for a missing key."""
    around = (tuple(path[:length]) for length in range(len(path), 0, -1))
    known = next((lines[one] for one in around if one in lines), None)
    return source if known is None else f"{source}:{known}"


def _beside(source: str, path: str) -> Path:
    return Path(os.path.abspath(Path(source).absolute().parent / os.path.expanduser(path)))

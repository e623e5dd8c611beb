"""Prompt files with one image per line: plain text, or JSON lines or CSV with fields of `ImageRequest` as columns."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.errors import ConfigError
from sd3tune.files.json import NotJson, parse
from sd3tune.files.regular import complaint, read_regular
from sd3tune.files.text import NotText, decode
from sd3tune.inference.checks import flag_of, problems_of
from sd3tune.inference.image_request import PARAMETERS, ImageRequest

COLUMNS = {name: parameter for name, parameter in PARAMETERS.items() if parameter.column}
"""The fields of `ImageRequest` that a line may set, by name. An empty value means not set."""


@dataclass(frozen=True)
class PromptLine:
    """The fields of an image request that one line sets."""

    place: str
    """`file:line`, for messages."""
    values: Mapping[str, Any]

    def named(self, column: str) -> str:
        """Return the name of a field for messages: the column if the line sets it, otherwise the option."""
        return f"{self.place}: {column if column in self.values else flag_of(column)}"


def read_prompts(path: Path) -> list[PromptLine]:
    """Read a .txt, .jsonl or .csv file. Raises ConfigError with every problem, each naming file and line."""
    kinds = {".txt": _text_lines, ".jsonl": _json_lines, ".csv": _csv_lines}
    if path.suffix.lower() not in kinds:
        raise ConfigError(f"--prompts {path}: neither a .txt, a .jsonl nor a .csv file")
    try:
        text = re.sub(r"\r\n?", "\n", decode(read_regular(path), f"--prompts {path}"))
    except OSError as error:
        raise ConfigError(f"--prompts {path}: {complaint(error)}") from None
    except NotText as error:
        raise ConfigError(str(error)) from None
    rows, problems = [], []
    for number, values in kinds[path.suffix.lower()](path, text):
        place = f"{path}:{number}"
        fields, faults = _checked(place, values)
        fields |= {name: path.parent / value for name, value in fields.items() if isinstance(value, Path)}
        rows.append(PromptLine(place, fields))
        problems += faults
    if not rows and not problems:
        problems.append(f"--prompts {path}: holds no prompts")
    if problems:
        raise ConfigError(*problems)
    return rows


def _text_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield one prompt per line, skipping blank lines and lines that begin with `#`."""
    for number, line in enumerate(text.split("\n"), start=1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield number, {"prompt": prompt}


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = parse(line, plain=False)
        except NotJson as error:
            raise ConfigError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f'{path}:{number}: each line is an object such as {{"prompt": "a dog"}}')
        yield number, values


def _csv_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    last = 1
    try:
        for values in reader:
            number, last = last + 1, reader.line_num  # a quoted value may span several lines
            if None in values:
                raise ConfigError(f"{path}:{number}: more values than columns; put a text with commas in quotes")
            yield number, values
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _checked(place: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields that a line sets, and a message for each of its problems."""
    fields, problems = {}, []
    for column, value in values.items():
        if column not in COLUMNS:
            close = difflib.get_close_matches(str(column), COLUMNS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the columns are {', '.join(COLUMNS)}"
            problems.append(f"{place}: {column}: unknown column; {hint}")
        elif value is not None and value != "":
            try:
                fields[column] = COLUMNS[column].reader(value)
            except ValueError as expected:
                problems.append(f"{place}: {column}: {value!r} is not {expected}")
    if not problems:
        if "prompt" not in fields:
            problems.append(f"{place}: prompt: missing")
        problems += problems_of(ImageRequest(**fields), lambda name: f"{place}: {name}")
    return fields, problems

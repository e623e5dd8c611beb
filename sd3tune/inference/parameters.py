"""The declaration of a request's field, in one place: its option, limits, column, grid axis and recipe key.

The command line, the columns of a prompt file, the axes of a grid, the recipe in a PNG and `generate` derive from it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sd3tune.errors import ConfigError

SAMPLING, IMAGE, TEXT = "Sampling", "From a picture", "Text"
MODEL, MEMORY = "Adapters and model", "Memory"
PANELS = (None, SAMPLING, IMAGE, TEXT, MODEL, MEMORY)
"""The groups of `sd3tune infer --help`, in order; None is the first one, which has no title."""

_SIZE = re.compile(r"(\d{1,9})(?:x(\d{1,9}))?", re.ASCII)
_NO_FILE_NAME = re.compile(r"[/\\]")
_METADATA = "parameter"


@dataclass(frozen=True)
class Parameter:
    """A field that users can set; `parameter` declares it."""

    name: str
    default: Any
    type: Any
    """The annotation without `| None`."""
    can_be_none: bool
    help: str | None
    flags: str
    metavar: str | None
    panel: str | None
    column: bool
    axis: bool
    recipe: str | None
    optional: bool
    requires: str | None
    reader: Callable[[Any], Any]
    check: Callable[[Any], str | None]

    @property
    def flag(self) -> str:
        """The option's name for messages, such as `--noise-offset`."""
        return self.flags.partition("/")[0]

    def read(self, value: Any) -> Any:
        """Convert a value from the command line, a cell or a caller to the field's type. Raises ConfigError."""
        try:
            return self.reader(value)
        except ValueError as expected:
            raise ConfigError(f"{self.flag} {value}: write {expected}") from None


def parameter(
    default: Any,
    help: str | None = None,
    *,
    flags: str | None = None,
    metavar: str | None = None,
    panel: str | None = None,
    column: bool = False,
    axis: bool = False,
    recipe: str | None = None,
    optional: bool = False,
    requires: str | None = None,
    read: Callable[[Any], Any] | None = None,
    check: Callable[[Any], str | None] = lambda value: None,
) -> Any:
    """Declare a field of a dataclass that users can set.

    `help` is the help text of its option; without it there is no option. `flags` is the option's name, by default
    derived from the field's. `column` and `axis` allow it in prompt files and grids. `recipe` is its key in the recipe
    of a PNG, `a.b` for the key b inside a. The recipe leaves an `optional` field out while it has its default, and one
    that `requires` another field while that one is None. `read` replaces the reader of the field's type: it converts a
    text or a JSON value, returns a value of the type unchanged, and raises ValueError with the expected form, such as
    "a whole number". `check` returns the fault of a value, or None.
    """
    properties = {
        "help": help, "flags": flags, "metavar": metavar, "panel": panel, "column": column, "axis": axis,
        "recipe": recipe, "optional": optional or requires is not None, "requires": requires, "reader": read,
        "check": check,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata={_METADATA: properties})


def parameters_of(owner: type) -> dict[str, Parameter]:
    """Return the parameters of a dataclass by field name, in the order of their declaration."""
    hints = get_type_hints(owner)
    return {
        field.name: _resolved(field, hints[field.name])
        for field in dataclasses.fields(owner)
        if _METADATA in field.metadata
    }


def _resolved(field: dataclasses.Field[Any], hint: Any) -> Parameter:
    properties = dict(field.metadata[_METADATA])
    is_union = get_origin(hint) in (Union, UnionType)
    (plain,) = [one for one in get_args(hint) if one is not type(None)] if is_union else [hint]
    properties["flags"] = properties["flags"] or f"--{field.name.replace('_', '-')}"
    properties["reader"] = properties["reader"] or _reader_of(plain)
    return Parameter(field.name, field.default, plain, plain is not hint, **properties)


def _reader_of(plain: Any) -> Callable[[Any], Any]:
    if get_origin(plain) is Sequence:
        read = READERS[get_args(plain)[0]]
        return lambda values: _read_several(values, read)
    return READERS[plain]


def _read_several(values: Any, read: Callable[[Any], Any]) -> list[Any]:
    if isinstance(values, str | os.PathLike):
        values = [values]
    try:
        return [read(value) for value in values]
    except TypeError:
        raise ValueError("a list") from None


# Readers convert a text or a JSON value, and return a value of the type unchanged.


def read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    if "\0" in value:
        raise ValueError("a text: it holds NUL characters")
    return value


def read_integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("a whole number")
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError("a whole number") from None


def read_number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError("a number")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a number") from None


def read_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def read_path(value: Any) -> Path:
    return Path(value) if isinstance(value, os.PathLike) else Path(read_text(value))


def read_size(value: Any) -> tuple[int, int]:
    """Return (width, height) from `512`, `1152x896` or a pair of whole numbers."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return read_integer(value[0]), read_integer(value[1])
    match = _SIZE.fullmatch(str(value).strip().lower())
    if match is None:
        raise ValueError("a side such as 1024, or WIDTHxHEIGHT such as 1152x896")
    return int(match[1]), int(match[2] or match[1])


def read_layers(value: Any) -> tuple[int, ...]:
    """Return block indices from `7,8,9` or a sequence of whole numbers."""
    if isinstance(value, tuple | list):
        return tuple(map(read_integer, value))
    numbers = [number.strip() for number in str(value).split(",")]
    if not all(number.isascii() and number.isdecimal() and len(number) < 10 for number in numbers):
        raise ValueError("numbers of blocks, such as 7,8,9")
    return tuple(map(int, numbers))


def read_file_name(value: Any) -> str:
    text = read_text(value)
    if not text or text.startswith(".") or _NO_FILE_NAME.search(text):
        raise ValueError("a file's name, without a folder and without .png")
    return text


READERS: dict[Any, Callable[[Any], Any]] = {
    str: read_text, int: read_integer, float: read_number, bool: read_switch, Path: read_path,
}  # fmt: skip
"""Type of a field -> its default reader."""

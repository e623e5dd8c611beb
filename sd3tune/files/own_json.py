"""Readers of sd3tune's own JSON files, which may have been edited or damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd3tune.errors import RunError
from sd3tune.files import json as json_files
from sd3tune.files.json import NotJson, parse_object
from sd3tune.files.regular import Refused, open_regular

MOST_BYTES = 256 * 2**20
"""Size limit of a file: about a manifest of a million images."""

Problem = Callable[[dict[str, Any]], str | None]
"""Object -> its fault; None for a valid one."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a file; it may contain NaN. Raises NotJson, and OSError for an unreadable file."""
    return json_files.read_object(path, MOST_BYTES, plain=False)


def read_lines(path: Path, problem: Problem) -> list[dict[str, Any]]:
    """Return the objects in a file of measurements, one per line; none if the file does not exist.

    A last line without line end, cut off when the writer was killed, is ignored. Raises RunError, with file and line,
    for any other line that is not an object or has a `problem`, and for a file that cannot be read.
    """
    if not path.exists():
        return []
    found = []
    try:
        with open_regular(path, largest=None) as file:
            for number, text in enumerate(file, 1):
                try:
                    line = parse_object(text, MOST_BYTES, plain=False)
                    wrong = problem(line)
                except NotJson as error:
                    wrong = str(error)
                if wrong is None:
                    found.append(line)
                elif text.endswith(b"\n"):
                    hint = "delete this line, which only the curves need, and run again"
                    raise RunError(f"{path}:{number}: {wrong}; {hint}")
    except OSError as error:
        reason = error.strerror if isinstance(error, Refused) else f"cannot be read: {error.strerror or error}"
        raise RunError(f"{path}: {reason}; remove it and run again") from None
    return found


def is_whole_number(value: Any) -> bool:
    """Return True for an integer from 0 to 2**63."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Return True for a finite number in the range of a float."""
    return type(value) in (int, float) and -1e300 < value < 1e300

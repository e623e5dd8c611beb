"""JSON files that sd3tune writes into its folders, read back with care: anybody may have edited or damaged them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd3tune.errors import RunError
from sd3tune.files import json as json_files
from sd3tune.files.json import NotJson, parse_object
from sd3tune.files.regular import Refused, open_regular

MOST_BYTES = 256 * 2**20
"""Of a file; a manifest of a million images is about this long."""

Problem = Callable[[dict[str, Any]], str | None]
"""What is wrong with an object; None for a good one."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a file, which may hold NaN. Raises NotJson, and OSError for a file that cannot be read."""
    return json_files.read_object(path, MOST_BYTES, plain=False)


def read_lines(path: Path, problem: Problem) -> list[dict[str, Any]]:
    """Return the objects in a file of measurements, one a line; of an absent file, none.

    A last line without its end was cut off when its writer was killed, and is left out. Raises RunError, which names
    file and line, for any other line that is no object or that has a `problem`; and for a file that cannot be read.
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
                    way_out = "delete this line, which only the curves need, and run again"
                    raise RunError(f"{path}:{number}: {wrong}; {way_out}")
    except OSError as error:
        reason = error.strerror if isinstance(error, Refused) else f"cannot be read: {error.strerror or error}"
        raise RunError(f"{path}: {reason}; remove it and run again") from None
    return found


def is_whole_number(value: Any) -> bool:
    """Return whether a value is an integer from 0 to 2**63."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that a float can hold."""
    return type(value) in (int, float) and -1e300 < value < 1e300

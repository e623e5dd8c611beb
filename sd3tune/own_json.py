"""JSON files that sd3tune writes into its folders, read back with care: anybody may have edited or damaged them."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from sd3tune.errors import RunError

MOST_BYTES = 256 * 2**20
"""Of a file; a manifest of a million images is about this long."""
_MOST_DEPTH = 32

Problem = Callable[[dict[str, Any]], str | None]
"""What is wrong with an object; None for a good one."""


class DamagedJson(ValueError):
    """A file that sd3tune did not write like this; the message says where and why."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a file. Raises DamagedJson, and OSError for a file that cannot be read."""
    with _open(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise DamagedJson(f"longer than {MOST_BYTES} bytes")
    return _object(data)


def read_lines(path: Path, problem: Problem) -> list[dict[str, Any]]:
    """Return the objects in a file of measurements, one a line; of an absent file, none.

    A last line without its end was cut off when its writer was killed, and is left out. Raises RunError, which names
    file and line, for any other line that is no object or that has a `problem`; and for a file that cannot be read.
    """
    if not path.exists():
        return []
    found = []
    try:
        with _open(path) as file:
            for number, text in enumerate(file, 1):
                try:
                    line = _object(text)
                    wrong = problem(line)
                except DamagedJson as error:
                    wrong = str(error)
                if wrong is None:
                    found.append(line)
                elif text.endswith(b"\n"):
                    way_out = "delete this line, which only the curves need, and run again"
                    raise RunError(f"{path}:{number}: {wrong}; {way_out}")
    except (OSError, DamagedJson) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path}: cannot be read: {reason}; remove it and run again") from None
    return found


def is_whole_number(value: Any) -> bool:
    """Whether a value is an integer from 0 to 2**63."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def _open(path: Path) -> BinaryIO:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise DamagedJson("not a regular file")
    return path.open("rb")


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except RecursionError:
        raise DamagedJson("nested too deeply") from None
    except ValueError as error:
        raise DamagedJson(f"no JSON ({error})") from None
    if not isinstance(value, dict):
        raise DamagedJson("not an object")
    _check_depth(value, _MOST_DEPTH)
    return value


def _check_depth(value: Any, left: int) -> None:
    if left == 0:
        raise DamagedJson("nested too deeply")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, left - 1)

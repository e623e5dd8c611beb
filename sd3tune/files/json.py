"""A strict JSON reader for files of any origin, with limits on size and depth."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from sd3tune.files.regular import Refused, open_regular

MOST_BYTES = 4 * 2**20
"""Size limit of a file; the longest one of a model, the index of its shards, has a twentieth."""
_MOST_DEPTH, _MOST_SHOWN = 64, 200
_LARGEST = 2**64


class NotJson(ValueError):
    """Data that is not JSON, or exceeds a limit; the message has the reason."""


def read_object(path: Path, most_bytes: int = MOST_BYTES, plain: bool = True) -> dict[str, Any]:
    """Return the keys and values in a file. Raises NotJson, and OSError for a file that cannot be read."""
    try:
        with open_regular(path, most_bytes) as file:
            data = file.read(most_bytes + 1)
    except Refused as error:
        raise NotJson(f"it {error.strerror}") from None
    return parse_object(data, most_bytes, plain)


def parse_object(data: str | bytes, most_bytes: int = MOST_BYTES, plain: bool = True) -> dict[str, Any]:
    """Return the keys and values of a JSON object, as `parse` does. Raises NotJson."""
    value = parse(data, most_bytes, plain)
    if not isinstance(value, dict):
        raise NotJson(f"expected a JSON object, not {json.dumps(value)[:60]}")
    return value


def parse(data: str | bytes, most_bytes: int = MOST_BYTES, plain: bool = True) -> Any:
    """Return the value of a JSON text.

    Raises NotJson for anything else, and for two cases that other readers accept: duplicate keys and deep nesting. If
    `plain`, also for integers beyond 64 bits, NaN and infinity, half of a surrogate pair and NUL characters. sd3tune
    itself writes such halves for file names that are not UTF-8, and NaN for missing measurements; other programs have
    them in columns that are not read here.
    """
    if len(data) > most_bytes:
        raise NotJson(f"it is longer than {most_bytes} bytes")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer if plain else _long_integer)
    except RecursionError:
        raise NotJson("it is nested too deeply") from None
    except NotJson:
        raise
    except ValueError as error:
        raise NotJson(str(error)) from None
    _check(value, plain)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise NotJson(f"the key {ascii(twice)[:60]} comes twice")
    return found


def _integer(text: str) -> float:
    """Return an integer, or infinity for one beyond 64 bits, which `_check` refuses."""
    return int(text) if len(text) <= 20 and abs(int(text)) < _LARGEST else math.inf


def _long_integer(text: str) -> float:
    """Return the number; infinity for one that no float holds, and that Python would not print."""
    return int(text) if len(text) <= 300 else math.inf


Place = tuple["str | int", ...]
"""The path of keys and indices to a value."""


def _check(value: Any, plain: bool) -> None:
    """Raise NotJson, with the key, for invalid text and numbers and for deep nesting; without recursion."""
    waiting: list[tuple[Any, Place]] = [(value, ())]
    while waiting:
        one, place = waiting.pop()
        if plain and isinstance(one, float) and not math.isfinite(one):
            raise NotJson(f"{_named(place)}not a finite number of 64 bits")
        if plain and isinstance(one, str):
            _check_text(one, place)
        elif isinstance(one, dict | list):
            if len(place) >= _MOST_DEPTH:
                raise NotJson("it is nested too deeply")
            for key in one if plain and isinstance(one, dict) else ():
                _check_text(key, place)
            inside = one.items() if isinstance(one, dict) else enumerate(one)
            waiting += [(inner, (*place, key)) for key, inner in inside]


def dotted(place: Place) -> str:
    """Return `transformer.lora_alpha`, escaped and shortened to one line."""
    named = ".".join(map(str, place))
    plain = named if named.isprintable() else ascii(named)
    return plain if len(plain) <= _MOST_SHOWN else f"{plain[:_MOST_SHOWN]}..."


def _named(place: Place) -> str:
    return f"{dotted(place)}: " if place else ""


def _check_text(text: str, place: Place) -> None:
    if "\0" in text:
        raise NotJson(f"{_named(place)}a NUL character in {ascii(text)[:60]}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotJson(f"{_named(place)}half of a surrogate pair in {ascii(text)[:60]}") from None

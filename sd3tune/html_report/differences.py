"""The configuration keys in which runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_NOT_COMPARED = ("name", "output_dir")


def differing_keys(configs: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, list[str]]]:
    """Return (key, value of each run) for each key that differs; `-` where a run lacks it."""
    flat = [dict(_leaves(config or {})) for config in configs]
    keys = dict.fromkeys(key for of in flat for key in of if key not in _NOT_COMPARED)
    rows = [(key, [of.get(key, "-") for of in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key path, value as YAML would show it)."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{number}")
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

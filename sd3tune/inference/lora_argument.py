"""The value of `--lora`: a path or a Hub repository, with `@weight` if it is not 1."""

from __future__ import annotations

import math
import re
from pathlib import Path

from sd3tune.errors import AdapterError


def parse_lora(value: str, flag: str = "--lora ") -> tuple[Path, float]:
    """Split `PATH` or `user/name:revision`, either with an optional `@weight`, into path and weight (1 by default).

    Raises AdapterError for a weight that is not a finite number.
    """
    path, separator, weight = value.rpartition("@")
    if not separator or Path(value).exists():
        _check_colon(value, flag)
        return Path(value), 1.0
    try:
        scale = float(weight)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise AdapterError(
            f"{flag}{value}: {weight!r} is not a weight; write PATH@0.8, or for a revision user/name:revision"
        )
    _check_colon(path, flag)
    return Path(path), scale


def _check_colon(value: str, flag: str) -> None:
    """Raise AdapterError for `PATH:0.8`, as other tools write a weight: a local path has no revision."""
    path, colon, weight = value.rpartition(":")
    if colon and path and Path(path).exists() and not Path(value).exists():
        is_weight = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", weight) is not None
        hint = f"write {path}@{weight}" if is_weight else f"write {path}; only a Hub repository has revisions"
        raise AdapterError(f"{flag}{value}: {hint}")

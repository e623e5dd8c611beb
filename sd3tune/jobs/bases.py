"""`sd3tune base path NAME`: where an offline base lies."""

from __future__ import annotations

from pathlib import Path

from sd3tune.errors import ModelError
from sd3tune.model.bases import TINY_SHAPES, resolve_base


def base_path(name: str) -> Path:
    """The diffusers folder of an offline base, built on first use. Raises ModelError for another name."""
    if name not in TINY_SHAPES:
        raise ModelError(f"{name}: not an offline base; one of {', '.join(TINY_SHAPES)}")
    return resolve_base(name).path

"""`sd3tune base path NAME`: print the folder of an offline base."""

from __future__ import annotations

from pathlib import Path

from sd3tune.errors import ModelError
from sd3tune.model.base.offline import OFFLINE, offline_folder, offline_kind


def base_path(name: str) -> Path:
    """Return the diffusers folder of an offline base, built on first use. Raises ModelError for any other name."""
    if offline_kind(name) is None:
        raise ModelError(f"{name}: not an offline base; one of {', '.join(OFFLINE)}")
    return offline_folder(name)

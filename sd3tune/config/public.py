"""A configuration for others to see: trackers and the Hub get no path of this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sd3tune.config.schema import Config


def public_config(config: Config) -> dict[str, Any]:
    """All values; of paths, which a loaded configuration has as absolute ones, the last part."""
    shown: dict[str, Any] = without_paths(config.model_dump(mode="json"))
    return shown


def without_paths(value: Any) -> Any:
    """The same nested value, with the last part of each absolute path in it."""
    if isinstance(value, dict):
        return {name: without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value

"""A configuration for trackers and the Hub, without paths of this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sd3tune.config.schema import Config


def public_config(config: Config) -> dict[str, Any]:
    """Return all values, with absolute paths reduced to their last part."""
    shown: dict[str, Any] = without_paths(config.model_dump(mode="json"))
    return shown


def without_paths(value: Any) -> Any:
    """Return the nested value with each absolute path reduced to its last part."""
    if isinstance(value, dict):
        return {name: without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value

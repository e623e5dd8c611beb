"""Folders that runs share: the store and the drawn class images."""

from __future__ import annotations

import os
from pathlib import Path

from sd3tune.config import Config


def store_folder(config: Config) -> Path:
    """Return `data.cache_dir`, else `$SD3TUNE_CACHE/store`, else `.cache/sd3tune` beside the run's parent folder."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir)
    if os.environ.get("SD3TUNE_CACHE"):
        return Path(os.environ["SD3TUNE_CACHE"]).expanduser().absolute() / "store"
    return Path(str(config.output_dir)).parent.parent / ".cache" / "sd3tune"


def class_image_folder(config: Config) -> Path:
    """Return the default folder for drawn class images, for sources that name none."""
    return store_folder(config) / "class-images"

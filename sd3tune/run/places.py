"""Where a run keeps what other runs can use again."""

from __future__ import annotations

import os
from pathlib import Path

from sd3tune.config import Config


def store_folder(config: Config) -> Path:
    """`data.cache_dir`, else `$SD3TUNE_CACHE/store`, else `.cache/sd3tune` beside the folder that holds the run."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir)
    if os.environ.get("SD3TUNE_CACHE"):
        return Path(os.environ["SD3TUNE_CACHE"]).expanduser().absolute() / "store"
    return Path(str(config.output_dir)).parent.parent / ".cache" / "sd3tune"


def class_image_folder(config: Config) -> Path:
    """Where class images lie that were drawn and not given a folder of their own."""
    return store_folder(config) / "class-images"

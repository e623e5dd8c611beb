"""Places that runs share: the store, the drawn class images, and the list of this machine's runs."""

from __future__ import annotations

import os
from pathlib import Path

from sd3tune.config import Config
from sd3tune.model.base.offline import bases_dir


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


def list_of_runs() -> Path:
    """Return the file that lists this user's runs: `$SD3TUNE_CACHE/runs.txt`, else `~/.cache/sd3tune/runs.txt`."""
    return bases_dir().parent / "runs.txt"

"""A path on the command line as an entry of `data.sources`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sd3tune.data.sources.dataset import is_dataset


def source_of(path: str, caption: str | None = None, **columns: str) -> dict[str, Any]:
    """Return the source for a folder of images, or for a dataset: a `.parquet` file, a saved dataset, or a Hub id.

    `columns` are the dataset's keys; `caption` is for images without their own.
    """
    found = Path(path).expanduser()
    on_the_hub = not found.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None
    if is_dataset(found) or on_the_hub:
        source = {"kind": "dataset", "path": path, **columns}
    else:
        source = {"kind": "folder", "path": path}
    return source if caption is None else {**source, "caption": caption}

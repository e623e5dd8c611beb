"""The thumbnail in an adapter's header (`modelspec.thumbnail`), shown by UIs; training never writes one."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

from sd3tune.adapter.modelspec import THUMBNAIL_KEY
from sd3tune.data.images import open_image
from sd3tune.errors import AdapterError
from sd3tune.files.regular import read_regular
from sd3tune.files.tensor_header import BadHeader, read_header
from sd3tune.run.previews import previews_of, run_of, step_of

SIDE, QUALITY = 256, 85


def thumbnail(picture: Path) -> dict[str, str]:
    """Return the metadata entry: a JPEG of at most 256 pixels a side as a data URI, 5 to 30 kB.

    Raises DataError if the file is not a picture.
    """
    image = open_image(picture)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=QUALITY)
    return {THUMBNAIL_KEY: f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"}


def preview_of(adapter: Path) -> Path | None:
    """Return the first preview that its run drew with an adapter file's weights; None without one."""
    run = run_of(adapter)
    try:
        step = None if run is None else step_of(adapter, run)
    except (OSError, ValueError, LookupError):  # the run's folder is damaged
        return None
    if run is None or step is None:
        return None
    return next((preview.path for preview in previews_of(run) if preview.step == step), None)


def with_metadata(adapter: Path, more: dict[str, str]) -> bytes:
    """Return the bytes of a safetensors file with added metadata and unchanged tensors.

    The header's order is kept, so that the same file and metadata give the same bytes. Raises AdapterError.
    """
    try:
        header = read_header(adapter)
        content = read_regular(adapter)
    except (BadHeader, OSError) as error:
        raise AdapterError(f"{adapter}: not a readable safetensors file: {error}") from None
    return replace(header, metadata=header.metadata | more).encode() + content[header.length :]

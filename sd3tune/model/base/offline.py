"""Bases that need no download: the tiny ones are built on first use, nano comes with the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

import sd3tune
from sd3tune.errors import ModelError
from sd3tune.files.atomic import system_error

TINY_SHAPES: dict[str, Literal["sd3", "sd35-medium", "sd35-large"]] = {
    "tiny": "sd35-medium",
    "tiny-sd3": "sd3",
    "tiny-sd35-medium": "sd35-medium",
    "tiny-sd35-large": "sd35-large",
}
TINY_RECIPE = 1  # part of the folder's name: increase it whenever `tiny.py` changes the files
NANO: Literal["nano"] = "nano"
NANO_FOLDER = Path(sd3tune.__file__).parent / "assets" / NANO
EARLIER_NANOS = {"nano-1": "e2de2265af9dcc50d9f82f5d77ae7576ad44c9ff54f4a9e6fc488e41df889997"}
"""Name of an earlier version of nano -> the fingerprint of its transformer. Their files still name it `nano`."""
_NANO_FOLDERS = {NANO: NANO_FOLDER, "nano-1": NANO_FOLDER.with_name("nano-1")}
OFFLINE = (*TINY_SHAPES, *_NANO_FOLDERS)


def offline_kind(name: str) -> Literal["tiny", "nano"] | None:
    """Return the kind of an offline base; None for any other name."""
    if name in _NANO_FOLDERS:
        return NANO
    return "tiny" if name in TINY_SHAPES else None


def offline_folder(name: str) -> Path:
    """Return the folder of an offline base, in diffusers' layout. Raises ModelError if it cannot be built."""
    return _NANO_FOLDERS[name] if name in _NANO_FOLDERS else _tiny_folder(TINY_SHAPES[name])


def name_of_version(name: str, fingerprint: str | None) -> str:
    """Return the name that a base has today, as written in a file beside the fingerprint of its transformer.

    It differs for the earlier versions of nano only.
    """
    earlier = (version for version, weights in EARLIER_NANOS.items() if name == NANO and weights == fingerprint)
    return next(earlier, name)


def bases_dir() -> Path:
    """Return the folder of the tiny bases: `$SD3TUNE_CACHE/bases`, else `~/.cache/sd3tune/bases`."""
    cache = os.environ.get("SD3TUNE_CACHE")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache" / "sd3tune") / "bases"


def _tiny_folder(shape: Literal["sd3", "sd35-medium", "sd35-large"]) -> Path:
    folder = bases_dir() / f"tiny-{shape}-v{TINY_RECIPE}"
    try:
        if not (folder / "model_index.json").is_file():
            from sd3tune.model.base.tiny import build_tiny

            build_tiny(shape, folder)
    except (OSError, SafetensorError) as error:
        cause = system_error(error)
        if cause is None:
            raise
        raise ModelError(
            f"{folder.parent}: the offline base cannot be built here ({cause.strerror}); "
            "free some space, or let SD3TUNE_CACHE name another folder"
        ) from error
    return folder

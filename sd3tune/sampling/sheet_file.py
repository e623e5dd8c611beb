"""The file of a contact sheet, which overwrites no other file."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3tune.errors import RunError
from sd3tune.files.atomic import new_file

_KEY = "sd3tune"


def check_sheet(path: Path, command: str) -> None:
    """Raise RunError if a contact sheet of `command`, such as "data check", would overwrite any other file."""
    if not path.exists():
        return
    try:
        with Image.open(path) as image:
            ours = image.info.get(_KEY) == command
    except Exception:  # any unreadable file is not ours
        ours = False
    if not ours:
        raise RunError(f"--sheet {path}: exists and is not a contact sheet; name another file")


def write_sheet(path: Path, command: str, picture: Image.Image) -> None:
    """Write a contact sheet as PNG, with a text that marks it as one of `command`."""
    info = PngInfo()
    info.add_text(_KEY, command)
    with new_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)

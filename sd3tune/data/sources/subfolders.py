"""The folders that a folder source reads: the folder itself, its subfolders, or kohya's `10_name class` folders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sd3tune.config.sections.data import FolderSource
from sd3tune.data.captions import counted, some
from sd3tune.data.formats import is_picture
from sd3tune.data.sources.masks import mask_folder
from sd3tune.errors import DataError

_KOHYA = re.compile(r"0*(?P<repeats>[1-9]\d{0,5})_(?P<caption>.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Part:
    """A folder whose own images are read."""

    folder: Path
    repeats: int = 1
    caption: str | None = None
    """Caption for images without their own."""


@dataclass(frozen=True)
class Parts:
    """The folders of a source."""

    parts: Sequence[Part]
    links: Sequence[Path] = ()
    """Links to folders, which are not followed."""
    passed_over: Sequence[str] = ()
    """A phrase for each kind of file and folder that is not read."""


def parts_of(source: FolderSource) -> Parts:
    """Return the folders to read. Raises OSError, and DataError if no subfolder has kohya's layout."""
    folder = Path(source.path)
    if source.layout == "kohya":
        return _kohya_parts(folder, source.recursive, mask_folder(source))
    parts, links = _with_subfolders(Part(folder), source.recursive)
    return Parts(parts, links, _links(links))


def is_kohya(name: str) -> bool:
    """Return True for a name such as `10_sks dog`: repeats, an underscore, a caption."""
    return _KOHYA.fullmatch(name) is not None


def holds_pictures(folder: Path) -> bool:
    """Return True if the folder or a subfolder contains an image. Ignores hidden files; does not follow links."""
    for _, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if any(is_picture(name) and not name.startswith(".") for name in files):
            return True
    return False


def _kohya_parts(folder: Path, recursive: bool, masks: Path | None) -> Parts:
    parts, others, loose, links = list[Part](), list[Path](), list[Path](), list[Path]()
    for path in sorted(folder.iterdir()):
        named = _KOHYA.fullmatch(path.name)
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            loose += [path] if is_picture(path.name) else []
        elif named is None:
            others += [path] if path != masks and holds_pictures(path) else []
        else:
            one = Part(path, int(named["repeats"]), named["caption"].strip() or None)
            found, dangling = _with_subfolders(one, recursive)
            parts += found
            links += dangling
    notes = _links(links)
    if loose:
        are = counted(loose, "picture outside the subfolders is", "pictures outside the subfolders are")
        notes.append(f"{are} not read: {some(path.name for path in loose)}")
    if others:
        are = counted(others, "subfolder with pictures is", "subfolders with pictures are")
        named_so = some(path.name for path in others)
        notes.append(f"{are} not read: {named_so}; layout: kohya reads names such as `10_sks dog`")
    if not parts:
        why = "; ".join(notes) or "for images in the folder itself, leave layout out"
        raise DataError(f"{folder}: has no subfolder named like `10_sks dog`, which layout: kohya reads; {why}")
    return Parts(parts, links, notes)


def _with_subfolders(part: Part, recursive: bool) -> tuple[list[Part], list[Path]]:
    """Return the part, with one for each subfolder if `recursive`, and links to folders, which are not followed."""
    if not recursive:
        return [part], []
    parts, links = list[Part](), list[Path]()
    for path, subfolders, _ in os.walk(part.folder, onerror=_fail):
        parts.append(replace(part, folder=Path(path)))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        links += [link for name in subfolders if (link := Path(path, name)).is_symlink()]
    return parts, links


def _links(links: list[Path]) -> list[str]:
    if not links:
        return []
    are = counted(links, "link to a folder is", "links to folders are")
    return [f"{are} not followed: {some(path.name for path in links)}; name the folder as a source of its own"]


def _fail(error: OSError) -> None:
    raise error

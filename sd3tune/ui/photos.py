"""The photos of a folder as training will see them, with crop, caption, mask and faults; caption files are written."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from sd3tune.config.sections.data import FolderSource
from sd3tune.data.ahead import ahead
from sd3tune.data.buckets import Size, bucket_table, nearest_bucket, size_name
from sd3tune.data.captions import own_sidecars, read_sidecar, sidecars
from sd3tune.data.formats import EXTENSIONS
from sd3tune.data.images import ImageRef, check_header, file_of, is_smaller, upright_size
from sd3tune.data.names import Names
from sd3tune.data.sources.folder import Listing, images_in, list_folder
from sd3tune.data.sources.masks import ENDINGS
from sd3tune.data.written import as_written
from sd3tune.errors import ConfigError, DataError
from sd3tune.files.atomic import new_file, write_text
from sd3tune.ui.workspace import Workspace, plain_name

LARGEST_UPLOAD = 200 * 2**20
"""Bytes of a photo; the largest files of cameras have about a hundred megabytes."""
_DEPTH = 3
_MOST_FOLDERS = 200
_LONGEST_CAPTION = 20_000


def folders_of_photos(workspace: Workspace) -> list[dict[str, Any]]:
    """Return the folders with pictures in the opened folders, to choose from; runs and hidden folders are left out."""
    found: list[dict[str, Any]] = []
    for folder in workspace.folders:
        for place in _below(folder, _DEPTH):
            count = sum(1 for _ in images_in(place))
            if count:
                found.append({"path": workspace.shown(place), "count": count})
            if len(found) == _MOST_FOLDERS:
                return found
    return found


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        inside = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    yield folder
    for path in inside if depth else ():
        name = os.path.basename(path)
        if not name.startswith(".") and name not in ("runs", "node_modules", "site-packages"):
            yield from _below(Path(path), depth - 1)


def folder_for_photos(workspace: Workspace, typed: str, name: str) -> Path:
    """Return a folder that exists: the one that was typed, or `photos/TYPED`, or a new one `photos/NAME`.

    Raises Outside.
    """
    if not typed:
        folder = workspace.path(f"photos/{plain_name(name or 'my-photos')}")
        numbered = (folder.with_name(f"{folder.name}-{number}") for number in range(2, 10_000))
        folder = next(one for one in (folder, *numbered) if not _has_files(one))
    elif "/" in typed or workspace.path(typed).is_dir():
        folder = workspace.path(typed)
        for part in folder.relative_to(next(one for one in workspace.folders if folder.is_relative_to(one))).parts:
            plain_name(part)
    else:
        folder = workspace.path(f"photos/{plain_name(typed)}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _has_files(folder: Path) -> bool:
    return os.path.lexists(folder) and not (folder.is_dir() and not os.listdir(folder))


def put_aside(workspace: Workspace, photo: Path) -> Path:
    """Move a photo with its caption and mask files into a hidden folder beside it, and return that. Raises Outside.

    Files that another photo of the same name uses, `1.txt` of `1.jpg` and `1.png`, stay with that one.
    """
    aside, names = workspace.path(str(photo.parent / ".removed")), Names()
    aside.mkdir(exist_ok=True)
    images = [image for image in images_in(photo.parent) if image != photo]
    masks = [image for image in images if image.stem in [photo.stem + ending for ending in ENDINGS]]
    files = [*sidecars(photo, names), *own_sidecars(photo, names, ()).values(), *masks]
    if any(image.stem == photo.stem for image in images):
        files = [file for file in files if file.name.startswith(photo.name)]
    for file in (*files, photo):
        file.rename(_free(aside / file.name))
    return aside


def describe_photos(
    workspace: Workspace, folder: Path, resolution: int, buckets: bool = True, caption: str | None = None
) -> dict[str, Any]:
    """Return the photos of a folder, with its problems and warnings. `caption` is for photos without their own."""
    try:
        listing = list_folder(FolderSource(path=str(folder)))
    except DataError as error:
        return {"folder": workspace.shown(folder), "photos": [], "warnings": [], "problems": error.problems}
    table = bucket_table(resolution) if buckets else [(resolution, resolution)]
    images = [image for image, _ in listing.images]
    own = {image: as_written(listed).text for image, listed in listing.images}

    def describe(image: ImageRef) -> dict[str, Any]:
        return _photo(workspace, image, listing, table, own[image], caption)

    return {
        "folder": workspace.shown(folder),
        "photos": list(ahead(describe, images)),
        "warnings": list(listing.warnings),
        "problems": [],
    }


def _photo(
    workspace: Workspace,
    image: ImageRef,
    listing: Listing,
    table: Sequence[Size],
    in_metadata: Sequence[str],
    caption: str | None,
) -> dict[str, Any]:
    path, mask = file_of(image), listing.masks.get(image)
    assert path is not None  # of a folder
    faults, described = list[str](), dict[str, Any]()
    if not workspace.holds(path):
        faults.append(f"{image.name}: a link to a file outside the opened folders, so it is not shown")
    else:
        try:
            check_header(image)
            described = _crop(upright_size(image), table, faults)
        except DataError as error:
            faults += [_short(problem, path) for problem in error.problems]
    text, editable = in_metadata[0] if in_metadata else "", not in_metadata
    file = listing.sidecars.get(image)
    if editable and file is not None:
        try:
            text = read_sidecar(file, path)
        except DataError as error:
            faults += [_short(problem, path) for problem in error.problems]
    if not text and not caption:
        faults.append("has no caption; write one, or give a caption for all photos")
    return {
        "name": image.name,
        "path": workspace.shown(path),
        "changed": _changed(path),
        "caption": text,
        "editable": editable,
        "mask": workspace.shown(file_of(mask) or path) if mask is not None else None,
        "faults": faults,
        **described,
    }


def _crop(size: Size, table: Sequence[Size], faults: list[str]) -> dict[str, Any]:
    """Return the size, the bucket, and the centred crop as shares of the width and the height."""
    bucket = nearest_bucket(size, table)
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    wide, high = bucket[1] / (size[1] * scale), bucket[0] / (size[0] * scale)
    if is_smaller(size, bucket):
        faults.append(f"is enlarged {scale:.2f}x, which blurs the result")
    if not math.isclose(wide * high, 1) and 1 - wide * high > 0.3:
        faults.append(f"loses {1 - wide * high:.0%} to its crop")
    return {"size": size_name(size), "bucket": size_name(bucket), "crop": [min(1.0, wide), min(1.0, high)]}


def _short(problem: str, path: Path) -> str:
    return problem.removeprefix(f"{path}: ").replace(f"{path.parent}/", "")


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns // 1000
    except OSError:
        return 0


def write_caption(workspace: Workspace, photo: Path, text: str, former: str) -> str:
    """Write the caption file of a photo, and remove it for an empty text. Return the text as it will be read.

    Raises ConfigError if the file no longer says `former`, as another page or program has changed it.
    """
    text = " ".join(text.split())
    if len(text) > _LONGEST_CAPTION:
        raise ConfigError(f"{photo.name}: the caption has {len(text)} characters; at most {_LONGEST_CAPTION}")
    files = sidecars(photo, Names())
    file = files[0] if files else photo.with_suffix(".txt")
    if not workspace.holds(file):
        raise ConfigError(f"{file.name}: a link to a file outside the opened folders; replace it by a file")
    try:
        now = read_sidecar(file, photo) if files else ""
    except DataError:
        now = ""  # an empty or unreadable file is replaced
    if now not in (former, text):
        raise ConfigError(f"{file.name}: was changed meanwhile to {now[:200]!r}; reload the page and edit again")
    if text:
        write_text(file, f"{text}\n")
    elif files:
        file.unlink()
    return text


async def receive_photo(folder: Path, name: str, pieces: AsyncIterator[bytes]) -> Path:
    """Write an uploaded photo, or a caption file, into a folder: whole and checked, or not at all. Raises UserError.

    An existing file is not replaced; the new one gets a number.
    """
    name = plain_name(name)
    is_text = name.lower().endswith(".txt")
    if not is_text and not name.lower().endswith(EXTENSIONS):
        raise ConfigError(f"{name}: not a photo; send JPEG, PNG, WebP and the like, or caption files (.txt)")
    target = _free(folder / name)
    most = _LONGEST_CAPTION if is_text else LARGEST_UPLOAD
    with new_file(target) as temporary:
        size = 0
        with temporary.open("wb") as file:
            async for piece in pieces:
                size += len(piece)
                if size > most:
                    raise ConfigError(f"{name}: more than {most // 1000:,} kB; scale it down")
                file.write(piece)
        if is_text:
            read_sidecar(temporary, target)
        else:
            _check(temporary, name)
    return target


def _check(temporary: Path, name: str) -> None:
    try:
        check_header(temporary)
    except DataError as error:
        raise DataError(*(problem.replace(str(temporary), name) for problem in error.problems)) from None


def _free(path: Path) -> Path:
    """Return the path, or one with a number if there is such a file already."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in range(2, 10_000))
    return next(one for one in (path, *numbered) if not os.path.lexists(one)) if os.path.lexists(path) else path

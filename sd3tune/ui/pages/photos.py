"""The photos of *New run*: folders, thumbnails, uploads and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from sd3tune.data.formats import EXTENSIONS
from sd3tune.errors import ConfigError
from sd3tune.ui.photos import (
    describe_photos,
    folder_for_photos,
    folders_of_photos,
    put_aside,
    receive_photo,
    write_caption,
)
from sd3tune.ui.pictures import FOR_LONG, picture_type, small_picture
from sd3tune.ui.rendering import workspace
from sd3tune.ui.workspace import Workspace

router = APIRouter()


class Caption(BaseModel):
    """A new caption; `former` is the one that was edited."""

    path: str
    text: str
    former: str


class NewFolder(BaseModel):
    """A folder for photos that will be dropped: one that was typed, else a new one for a run's name."""

    folder: str = ""
    name: str = ""


class Chosen(BaseModel):
    """A photo."""

    path: str


@router.get("/api/photos/folders")
def folders(request: Request) -> list[dict[str, Any]]:
    return folders_of_photos(workspace(request))


@router.get("/api/photos")
def photos(request: Request, folder: str, resolution: int = 1024, buckets: bool = True, caption: str = "") -> Any:
    """Return the photos of a folder as they would be trained on at a resolution."""
    opened = workspace(request)
    if not 16 <= resolution <= 8192:
        raise ConfigError(f"resolution: {resolution}: give pixels from 16 to 8192")
    return describe_photos(opened, opened.path(folder), resolution, buckets, caption or None)


@router.post("/api/photos/folder")
def make_folder(request: Request, new: NewFolder) -> dict[str, str]:
    """Return the typed folder, which is made if it is not there yet, or a new folder `photos/NAME`."""
    folder = folder_for_photos(workspace(request), new.folder, new.name)
    return {"folder": workspace(request).shown(folder)}


@router.post("/api/photos/upload")
async def upload(request: Request, folder: str, name: str) -> dict[str, str]:
    """Write the body as a photo, or as a caption file, into a folder."""
    opened = workspace(request)
    target = opened.path(folder)
    if not target.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    written = await receive_photo(target, name, request.stream())
    return {"path": opened.shown(written)}


@router.post("/api/photos/caption")
def caption(request: Request, new: Caption) -> dict[str, str]:
    opened = workspace(request)
    return {"text": write_caption(opened, _photo_at(opened, new.path), new.text, new.former)}


@router.post("/api/photos/remove")
def remove(request: Request, chosen: Chosen) -> dict[str, str]:
    """Move a photo, with its caption and mask files, into the hidden folder `.removed` beside it."""
    opened = workspace(request)
    return {"folder": opened.shown(put_aside(opened, _photo_at(opened, chosen.path)))}


def _photo_at(opened: Workspace, path: str) -> Path:
    photo = opened.path(path)
    if not photo.is_file() or not photo.name.lower().endswith(EXTENSIONS):
        raise ConfigError(f"{path}: no such photo")
    return photo


@router.get("/api/small")
async def small(request: Request, path: str, side: int = 192) -> Response:
    """Return a picture scaled down; the address also names its time, so browsers may keep it."""
    data = await run_in_threadpool(small_picture, workspace(request).path(path), side)
    return Response(data, media_type="image/webp", headers=FOR_LONG)


@router.get("/api/picture")
def picture(request: Request, path: str) -> Response:
    """Return a picture as it is."""
    file = workspace(request).path(path)
    return FileResponse(file, media_type=picture_type(file), headers=FOR_LONG)

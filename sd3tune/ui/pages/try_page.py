"""*Try*: a form for `sd3tune infer`, its command, and the pictures of the folder that it draws into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from sd3tune.errors import UserError
from sd3tune.inference.parameters import PANELS, Parameter
from sd3tune.invocation import command_line
from sd3tune.model.base.offline import NANO, TINY_SHAPES
from sd3tune.ui.drawing import OFFERED, SAMPLERS, examples, words_of
from sd3tune.ui.drawn import described, digest, pictures
from sd3tune.ui.products import sources
from sd3tune.ui.rendering import jobs, page, workspace
from sd3tune.ui.workspace import Workspace

router = APIRouter()

_OWN_PLACE = (
    "prompt", "negative", "seed", "num", "size", "steps", "guidance", "out", "before", "loras", "embeddings", "base",
    "grid", "from_picture",
)  # fmt: skip
"""Fields that the template places itself; the others follow by their panel."""
_BASES = (
    NANO,
    next(iter(TINY_SHAPES)),
    "stabilityai/stable-diffusion-3.5-medium",
    "stabilityai/stable-diffusion-3.5-large",
    "stabilityai/stable-diffusion-3-medium-diffusers",
)
_LONGEST_TITLE = 60


class Asked(BaseModel):
    """The form: names of parameters and their values (see `drawing.Values`)."""

    values: dict[str, bool | str | list[str] | None]


@router.get("/try")
def show(request: Request) -> Response:
    panels = [
        (title or "Batches and missing files", [one for one in _further() if one.panel == title])
        for title in (*PANELS[1:], PANELS[0])
    ]
    return page(
        request,
        "try.html",
        title="Try",
        fields=OFFERED,
        panels=[(title, fields) for title, fields in panels if fields],
        samplers=SAMPLERS,
        bases=_BASES,
        axes=examples(),
    )


@router.get("/api/try/sources")
def listed(request: Request) -> list[dict[str, Any]]:
    """Return what can be drawn with, and its inference settings."""
    opened = workspace(request)
    return [
        {
            "place": opened.shown(source.place),
            "name": source.name,
            "weights": [
                {
                    "kind": one.kind,
                    "path": opened.shown(one.path),
                    "label": one.label,
                    "step": one.step,
                    "settings": one.settings,
                }
                for one in source.weights
            ],
        }
        for source in sources(opened)
    ]


@router.get("/api/try/pictures")
def drawn(request: Request, folder: str, known: str = "") -> dict[str, Any]:
    """Return a folder's pictures, newest first; None if they are those of the digest `known`."""
    opened = workspace(request)
    found = pictures(opened.path(folder))
    now = digest(found)
    shown = [{"path": opened.shown(path), "changed": str(changed)} for path, changed in found]
    return {"digest": now, "pictures": None if now == known else shown}


@router.get("/api/try/recipe")
async def recipe(request: Request, path: str) -> dict[str, Any]:
    """Return what a picture's recipe says, as words and as values of the form."""
    opened = workspace(request)
    picture = opened.path(path)
    found = await run_in_threadpool(described, opened, picture)
    shown = opened.shown(picture)
    words = ["infer", "--from", shown, *(["--base", found["base"]] if found.get("base") else [])]
    return {**found, "path": shown, "command": command_line("sd3tune", *words) if found.get("repeats") else None}


@router.post("/api/try/command")
def command(request: Request, asked: Asked) -> dict[str, Any]:
    """Return the command that draws what the form asks for, or the lines that say why there is none."""
    try:
        return {"command": command_line("sd3tune", *_words(workspace(request), asked)), "problems": []}
    except UserError as error:
        return {"command": None, "problems": error.problems}


@router.post("/api/try/draw")
def draw(request: Request, asked: Asked) -> dict[str, Any]:
    """Put the command into the queue."""
    words = _words(workspace(request), asked)
    about = asked.values.get("prompt") or Path(str(asked.values.get("from_picture") or "grid")).stem
    title = " ".join(f"Draw {about}".split())
    short = title if len(title) <= _LONGEST_TITLE else f"{title[:_LONGEST_TITLE]}…"
    return jobs(request).add(words, short).as_json()


def _words(opened: Workspace, asked: Asked) -> list[str]:
    picture = asked.values.get("from_picture")
    recipe = described(opened, opened.path(picture))["values"] if isinstance(picture, str) and picture else None
    return words_of(opened, asked.values, recipe or {})


def _further() -> list[Parameter]:
    return [one for name, one in OFFERED.items() if name not in _OWN_PLACE]

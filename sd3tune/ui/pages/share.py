"""*Share*: a run's card, the files that go up and their push, other tools' formats, and downloads."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel
from starlette.responses import FileResponse, Response

from sd3tune.config.sections.outputs import REPO_ID, REPO_ID_IN_WORDS
from sd3tune.errors import ConfigError, UserError
from sd3tune.invocation import command_line
from sd3tune.publish.files import CARD
from sd3tune.ui.card import as_html, read_card
from sd3tune.ui.pictures import picture_type
from sd3tune.ui.rendering import jobs, page, workspace
from sd3tune.ui.sharing import Shared, readers, token_state

router = APIRouter()


class Push(BaseModel):
    """An upload of a run; an empty `repo_id` is the configuration's."""

    run: str
    repo_id: str = ""
    thumbnail: str = ""


class Convert(BaseModel):
    """A copy of an adapter for another tool."""

    run: str
    weights: str
    form: str


@router.get("/share")
def show(request: Request) -> Response:
    return page(request, "share.html", title="Share", forms=readers())


@router.get("/api/share")
def described(request: Request, run: str) -> dict[str, Any]:
    """Return what *Share* shows of a run."""
    shared = Shared.of(workspace(request), run)
    opened, hub = shared.workspace, shared.hub()
    header, markdown = read_card(shared.run / CARD)
    try:
        uploads, fault = shared.uploads(), None
    except (UserError, OSError) as error:
        uploads, fault = [], str(error)
    return {
        "run": opened.shown(shared.run),
        "name": shared.run.name,
        "finished": shared.is_finished,
        "header": header,
        "card": as_html(header, markdown, opened.shown(shared.run)),
        "uploads": uploads,
        "fault": fault,
        "left_out": shared.left_out(),
        "repo_id": hub.repo_id or "",
        "private": hub.private,
        "token": token_state(),
        "weights": [
            {"path": opened.shown(one.path), "label": one.label, "kind": one.kind} for one in shared.source.weights
        ],
        "results": [{"name": name, "size": path.stat().st_size} for name, path in shared.results().items()],
    }


@router.get("/api/share/download")
def download(request: Request, run: str, name: str) -> Response:
    """Return one of a run's results as a file to keep."""
    shared = Shared.of(workspace(request), run)
    file = shared.results().get(name)
    if file is None or not shared.workspace.holds(file):
        raise HTTPException(404, f"{name}: not among the results of {run}")
    saved = f"{shared.run.name}.safetensors" if name.startswith("adapter/pytorch") else file.name
    return FileResponse(file, media_type="application/octet-stream", filename=saved)


@router.post("/api/share/command")
def command(request: Request, asked: Push) -> dict[str, Any]:
    """Return the command that pushes, or why there is none."""
    try:
        words = _push_words(Shared.of(workspace(request), asked.run), asked)
    except UserError as error:
        return {"command": None, "problems": error.problems}
    return {"command": command_line("sd3tune", *words), "problems": []}


@router.post("/api/share/push")
def push(request: Request, asked: Push) -> dict[str, Any]:
    """Start the upload at once; it needs no GPU."""
    shared = Shared.of(workspace(request), asked.run)
    return jobs(request).add(_push_words(shared, asked), f"Push {shared.run.name}", in_queue=False).as_json()


@router.post("/api/share/convert")
def convert(request: Request, asked: Convert) -> dict[str, Any]:
    """Start the conversion at once, into a new file of the run folder."""
    shared = Shared.of(workspace(request), asked.run)
    source, out = shared.new_file(asked.weights, asked.form)
    words = ["lora", "convert", shared.word(source), "--to", asked.form, "--out", shared.word(out)]
    return jobs(request).add(words, f"Convert {shared.run.name} for {asked.form}", in_queue=False).as_json()


def _push_words(shared: Shared, asked: Push) -> list[str]:
    """Return the words behind `sd3tune`. Raises ConfigError for the name of no repository, NoPicture and Outside."""
    words = ["hub", "push", shared.word(shared.run)]
    if asked.repo_id:
        if not REPO_ID.fullmatch(asked.repo_id):
            raise ConfigError(f"{asked.repo_id}: cannot name a repository; {REPO_ID_IN_WORDS}")
        words += ["--repo-id", asked.repo_id]
    elif shared.hub().repo_id is None:
        raise ConfigError("Write the repository, such as user/name.")
    if asked.thumbnail:
        picture = shared.workspace.path(asked.thumbnail)
        picture_type(picture)
        words += ["--thumbnail", shared.workspace.shown(picture)]
    return words

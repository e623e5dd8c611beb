"""*New run*: photos, a configuration from a preset with a form beside it, the plan, and the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from sd3tune.config import json_schema
from sd3tune.config.presets import all_presets
from sd3tune.errors import ConfigError
from sd3tune.invocation import command_line
from sd3tune.run.listing import summarize_run
from sd3tune.ui import drafts
from sd3tune.ui.asking import answer
from sd3tune.ui.drafts import Draft
from sd3tune.ui.jobs import Job
from sd3tune.ui.pages import photos
from sd3tune.ui.rendering import jobs, page, workspace
from sd3tune.ui.workspace import JOBS

router = APIRouter()
router.include_router(photos.router)


class New(BaseModel):
    """A configuration to create."""

    name: str
    preset: str
    base: str = ""
    photos: str
    caption: str = ""


class Text(BaseModel):
    """A configuration as it stands on the page; `former` is the digest of the file that it was read from."""

    file: str
    text: str
    former: str = ""


class Edit(Text):
    """One change by the form: a value, or `raw` text of YAML."""

    path: list[str | int]
    value: Any = None
    raw: str | None = None


class Named(BaseModel):
    """A configuration file."""

    file: str
    resume: bool = False


@router.get("/new")
def show(request: Request) -> Response:
    return page(request, "new.html", title="New run")


@router.get("/api/new/choices")
def choices(request: Request) -> dict[str, Any]:
    """Return the presets, the bases, and the configurations in the first opened folder."""
    files = [path for path in workspace(request).root.glob("*.y*ml") if path.suffix in (".yaml", ".yml")]
    return {
        "presets": [{"name": one.name, "description": one.description} for one in all_presets()],
        "bases": [
            {"name": name, "title": one.name, "description": one.about, "small": one.is_small}
            for name, one in drafts.BASES.items()
        ],
        "files": sorted(path.name for path in files if path.is_file() and not path.name.startswith(".")),
    }


@router.get("/api/new/schema")
def schema() -> dict[str, Any]:
    """Return the JSON Schema, whose descriptions are those of the reference."""
    return json_schema()


@router.post("/api/new/create")
def create(request: Request, new: New) -> dict[str, Any]:
    draft = drafts.create(workspace(request), new.name, new.preset, new.base, new.photos, new.caption)
    return {"file": draft.file.name}


@router.get("/api/new/file")
def read(request: Request, file: str) -> dict[str, Any]:
    """Return a configuration's text with what `check` returns."""
    draft = Draft.of(workspace(request), file)
    text = draft.text()
    return {"text": text, "digest": drafts.digest(text), **draft.check(text)}


@router.post("/api/new/check")
def check(request: Request, given: Text) -> dict[str, Any]:
    return Draft.of(workspace(request), given.file).check(given.text)


@router.post("/api/new/edit")
def edit(request: Request, given: Edit) -> dict[str, Any]:
    """Return the text with one value changed, and what `check` returns; nothing is written."""
    text = drafts.edited(given.text, given.path, given.value, given.raw)
    return {"text": text, **Draft.of(workspace(request), given.file).check(text)}


@router.post("/api/new/save")
def save(request: Request, given: Text) -> dict[str, str]:
    return {"digest": Draft.of(workspace(request), given.file).save(given.text, given.former)}


@router.post("/api/new/plan")
def plan(request: Request, given: Named) -> dict[str, Any]:
    """Return what `sd3tune plan` says for this machine's GPU, else for the CPU."""
    return answer(["plan", _ready(request, given).file.name], workspace(request).root)


@router.post("/api/new/examine")
def examine(request: Request, given: Named) -> dict[str, Any]:
    """Return what `sd3tune data check` says about the photos."""
    sheet = str(JOBS / "data-check.png")
    return answer(["data", "check", _ready(request, given).file.name, "--sheet", sheet], workspace(request).root)


@router.post("/api/new/start")
def start(request: Request, given: Named) -> dict[str, Any]:
    """Put the training into the queue. Raises ConfigError if it waits or runs there already."""
    draft = _ready(request, given)
    described = draft.check(draft.text())
    same = active(request, described["run"])
    if same is not None:
        raise ConfigError(f"{draft.file.name}: {same.command} is {same.state} already")
    words = ["train", draft.file.name, *(["--resume"] if given.resume else [])]
    return jobs(request).add(words, draft.file.stem, Path(described["run"])).as_json()


@router.get("/api/new/state")
def state(request: Request, file: str) -> dict[str, Any]:
    """Return the newest job of a configuration's run, how far the run is, and the command that starts it."""
    draft = Draft.of(workspace(request), file)
    described = draft.check(draft.text())
    run = described.get("run")
    newest = next((job for job in reversed(jobs(request).all()) if run is not None and job.run == run), None)
    begun = run is not None and any((Path(run) / "checkpoints").glob("step-*"))
    words = ["train", file, *(["--resume"] if begun else [])]
    return {
        "job": newest.as_json() if newest else None,
        "begun": begun,
        "finished": run is not None and _has_all_steps(Path(run), described["values"]["train"]["steps"]),
        "run": run,
        "command": command_line("sd3tune", *words),
    }


def _has_all_steps(run: Path, steps: int | None) -> bool:
    found = summarize_run(run)
    return found.state == "finished" and found.step >= (steps or 0)


def active(request: Request, run: str) -> Job | None:
    """Return the job that trains in a run folder, or waits to."""
    return next((job for job in jobs(request).all() if job.run == run and job.state in ("queued", "running")), None)


def _ready(request: Request, given: Named) -> Draft:
    """Return a draft whose file has no problems. Raises ConfigError."""
    draft = Draft.of(workspace(request), given.file)
    if problems := draft.check(draft.text())["problems"]:
        raise ConfigError(*(f"{draft.file.name}:{one['line'] or ''}: {one['text']}" for one in problems))
    return draft

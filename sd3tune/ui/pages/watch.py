"""*Watch*: the runs of this machine, and one of them: progress, previews, curves, evaluation, log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from sd3tune.config.run_folder import CONFIG_FILE, read_run_file
from sd3tune.errors import ConfigError
from sd3tune.invocation import command_line
from sd3tune.run.listing import list_runs, summarize_run
from sd3tune.ui import runs
from sd3tune.ui.jobs import Job
from sd3tune.ui.pages.jobs import tail
from sd3tune.ui.pictures import FOR_LONG, picture_type, small_picture
from sd3tune.ui.rendering import jobs, page, workspace

router = APIRouter()
_FACTS = ("images", "held_out_images", "device", "gpu", "dtype", "world_size", "timings", "warnings", "skipped_steps")


class Named(BaseModel):
    """A run folder."""

    run: str


@router.get("/watch")
def show(request: Request) -> Response:
    return page(request, "watch.html", title="Watch")


@router.get("/api/runs")
def listed(request: Request) -> list[dict[str, Any]]:
    """Return the runs in the opened folders, and all that this user began in a terminal; last active first."""
    opened = workspace(request)
    started = {job.run: job for job in jobs(request).all() if job.words[:1] == ("train",)}  # the newest of each run
    found = list_runs(runs.places_of_runs(opened))
    return [with_job(runs.summary_json(opened, one), started.get(str(one.folder))) for one in found]


@router.get("/api/run")
def one(request: Request, run: str) -> dict[str, Any]:
    """Return the state of a run, what started it, and its memory while it runs."""
    opened = workspace(request)
    folder = runs.known_run(opened, run)
    job = newest_job(request, folder)
    facts = read_run_file(folder)
    summary = with_job(runs.summary_json(opened, summarize_run(folder)), job)
    active = summary["state"] == "running"
    return {
        **summary,
        "begun": bool(facts),
        "base": base.get("name") if isinstance(base := facts.get("base"), dict) else None,
        "facts": {name: facts[name] for name in _FACTS if name in facts},
        "report": runs.plain(facts.get("report")),
        "job": job.as_json() if job else None,
        "memory": runs.memory_of(folder, job.pid if job else None) if active else None,
        "resume": command_line("sd3tune", *resume_words(request, folder, job)),
        "here": opened.holds(folder),
    }


@router.get("/api/run/metrics")
def metrics(request: Request, run: str, at: str = "") -> dict[str, Any]:
    return runs.new_metrics(runs.known_run(workspace(request), run), at)


@router.get("/api/run/held-out")
def held_out(request: Request, run: str) -> list[dict[str, Any]]:
    return runs.held_out(runs.known_run(workspace(request), run))


@router.get("/api/run/previews")
def previews(request: Request, run: str) -> dict[str, Any]:
    return runs.previews(runs.known_run(workspace(request), run))


@router.get("/api/run/evaluation")
def evaluation(request: Request, run: str) -> dict[str, Any]:
    return {"evaluation": runs.evaluation(runs.known_run(workspace(request), run))}


@router.get("/api/run/log")
def log(request: Request, run: str) -> dict[str, Any]:
    """Return the log of the job that the page started for a run; a terminal keeps its own."""
    job = newest_job(request, runs.known_run(workspace(request), run))
    return {"log": tail(job) if job else None}


@router.get("/api/run/config")
def configuration(request: Request, run: str) -> dict[str, str]:
    folder = runs.known_run(workspace(request), run)
    return {"text": runs.configuration(folder)}


@router.get("/api/run/small")
async def small(request: Request, run: str, name: str, side: int = 192) -> Response:
    """Return a picture of a run scaled down; the address also names its time, so browsers may keep it."""
    file = runs.file_of_run(runs.known_run(workspace(request), run), name)
    return Response(await run_in_threadpool(small_picture, file, side), media_type="image/webp", headers=FOR_LONG)


@router.get("/api/run/picture")
def picture(request: Request, run: str, name: str) -> Response:
    file = runs.file_of_run(runs.known_run(workspace(request), run), name)
    return FileResponse(file, media_type=picture_type(file), headers=FOR_LONG)


@router.post("/api/run/resume")
def resume(request: Request, named: Named) -> dict[str, Any]:
    """Put the run's own command into the queue, with --resume. Raises ConfigError if it runs or waits."""
    opened = workspace(request)
    folder = runs.known_run(opened, named.run)
    job = newest_job(request, folder)
    if (job and job.state in ("queued", "running")) or summarize_run(folder).state == "running":
        raise ConfigError(f"{folder.name}: runs or waits already")
    words = resume_words(request, folder, job)
    if not opened.holds(folder):
        line = command_line("sd3tune", *words)
        raise ConfigError(f"{folder}: outside the opened folders; resume it in a terminal: {line}")
    return jobs(request).add(words, folder.name, folder).as_json()


def resume_words(request: Request, folder: Path, job: Job | None) -> list[str]:
    """Return the words that continue a run: those of its job, else its own configuration, which names the folder."""
    if job is not None:
        return [*job.words, *([] if "--resume" in job.words else ["--resume"])]
    return ["train", workspace(request).shown(folder / CONFIG_FILE), "--resume"]


def with_job(summary: dict[str, Any], job: Job | None) -> dict[str, Any]:
    """Return a run's summary with what only its job knows.

    A job waits, loads and encodes before the run folder shows it, and its exit code tells a killed run from a stopped
    one.
    """
    if job is None or summary["state"] == "running":
        return summary
    state = job.state
    if state in ("queued", "running"):
        return {**summary, "state": state}
    if state == "failed" and job.ended >= summary["active"] - 1:
        return {**summary, "state": state, "reason": summary["reason"] or _why_failed(job)}
    return summary


def _why_failed(job: Job) -> str:
    """Return the error that a job's log ends with."""
    errors = [line.removeprefix("error: ") for line in tail(job).splitlines() if line.startswith("error: ")]
    return errors[-1] if errors else f"the command ended with exit code {job.code}; its log says why"


def newest_job(request: Request, folder: Path) -> Job | None:
    """Return the last training that the page started in a run folder."""
    same = (job for job in reversed(jobs(request).all()) if job.run == str(folder) and job.words[:1] == ("train",))
    return next(same, None)

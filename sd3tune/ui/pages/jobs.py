"""*Queue*: the commands that the page has started, one at a time those of trainings; their logs; stop and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel
from starlette.responses import Response

from sd3tune.ui.jobs import LOG, Job, stop
from sd3tune.ui.rendering import jobs, page

router = APIRouter()
_LOG_BYTES = 64 * 2**10
"""At most this much of a log's end is shown."""


class Chosen(BaseModel):
    """A job of the page."""

    id: str


@router.get("/jobs")
def show(request: Request) -> Response:
    return page(request, "jobs.html", title="Queue")


@router.get("/api/jobs")
def listed(request: Request) -> list[dict[str, Any]]:
    """Return all jobs, newest first."""
    return [job.as_json() for job in reversed(jobs(request).all())]


@router.get("/api/jobs/log")
def log(request: Request, id: str) -> dict[str, Any]:
    """Return the job with the end of its log, as a terminal would show it."""
    job = found(request, id)
    return {**job.as_json(), "log": tail(job)}


@router.post("/api/jobs/stop")
def stop_job(request: Request, chosen: Chosen) -> dict[str, Any]:
    """Send Ctrl-C to a running job; take a waiting one out of the queue."""
    job = found(request, chosen.id)
    if job.state == "queued":
        jobs(request).remove(job)
        return {"state": "removed"}
    stop(job)
    return job.as_json()


@router.post("/api/jobs/remove")
def remove(request: Request, chosen: Chosen) -> dict[str, Any]:
    """Remove an ended job from the list; what it wrote elsewhere stays."""
    jobs(request).remove(found(request, chosen.id))
    return {"state": "removed"}


@router.post("/api/jobs/again")
def again(request: Request, chosen: Chosen) -> dict[str, Any]:
    """Put the command of a job into the queue once more; a training goes on from its last checkpoint."""
    job = found(request, chosen.id)
    words = [*job.words, *(["--resume"] if job.words[0] == "train" and "--resume" not in job.words else [])]
    added = jobs(request).add(words, job.title, Path(job.run) if job.run else None, in_queue=job.in_queue)
    return added.as_json()


def found(request: Request, id: str) -> Job:
    """Return the job of an id. Raises HTTPException 404."""
    job = jobs(request).find(id)
    if job is None:
        raise HTTPException(404, f"{id}: no such job; it was removed")
    return job


def tail(job: Job) -> str:
    """Return the end of a job's log; of lines that a progress bar has redrawn, the last state."""
    try:
        with (job.folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))

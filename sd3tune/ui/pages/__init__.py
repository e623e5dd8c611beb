"""The pages: one file each, with a `router`, a template in `assets/templates` and an entry below.

A page that shows how many jobs there are is this file `pages/count.py`, with the entry `("/count", "Count",
count.router)` below, and a template `count.html`, which begins like `jobs.html`:

    router = APIRouter()

    @router.get("/count")
    def show(request: Request) -> Response:
        return page(request, "count.html", title="Count", count=len(jobs(request).all()))

Its script is `assets/web/count.js`; data for it come from `@router.get("/api/count")`, which returns plain values.
A picture or folder that a request names goes through `workspace(request).path(text)`. A command is started with
`jobs(request).add(["infer", ...], "a title", in_queue=False)`, and never in another way.
"""

from __future__ import annotations

from fastapi import APIRouter

from sd3tune.ui.pages import jobs, new, share, try_page, watch

NAVIGATION: tuple[tuple[str, str, APIRouter], ...] = (
    ("/new", "New run", new.router),
    ("/watch", "Watch", watch.router),
    ("/try", "Try", try_page.router),
    ("/share", "Share", share.router),
    ("/jobs", "Queue", jobs.router),
)
"""Address, name and router of each page, in the order of the menu."""

"""Answers of the pages: templates, which escape all values, and the parts of the app that every page needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.templating import Jinja2Templates
from starlette.responses import Response

import sd3tune
from sd3tune.ui.jobs import Jobs
from sd3tune.ui.workspace import Workspace

ASSETS = Path(sd3tune.__file__).parent / "assets"
TEMPLATES = Jinja2Templates(ASSETS / "templates")  # escapes HTML


def workspace(request: Request) -> Workspace:
    """Return the opened folders."""
    found: Workspace = request.app.state.workspace
    return found


def jobs(request: Request) -> Jobs:
    """Return the jobs of the opened folders."""
    found: Jobs = request.app.state.jobs
    return found


def page(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """Return a page of `assets/templates`, which extends `base.html`."""
    from sd3tune.ui.pages import NAVIGATION

    common = {"navigation": NAVIGATION, "folder": workspace(request).root, "version": sd3tune.__version__}
    return TEMPLATES.TemplateResponse(request, template, {**common, **values}, status_code=status)

"""The web application: its pages, the login, the static files, and the thread that starts queued jobs."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.responses import JSONResponse, RedirectResponse, Response

from sd3tune.errors import UserError
from sd3tune.reporting import say
from sd3tune.ui.jobs import Jobs
from sd3tune.ui.pages import NAVIGATION
from sd3tune.ui.rendering import ASSETS, page
from sd3tune.ui.security import LOGIN, Access, Guard, admitted
from sd3tune.ui.workspace import Outside, Workspace

_SECONDS = 0.5
"""Between two looks at the queue."""
_LOGIN_BYTES = 4096


def make_app(workspace: Workspace, access: Access) -> FastAPI:
    """Return the application for the opened folders; while it runs, queued jobs start one after the other."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=_with_queue)
    app.state.workspace, app.state.jobs, app.state.access = workspace, Jobs(workspace.jobs, workspace.root), access
    app.add_middleware(Guard, access=access)
    app.mount("/assets", StaticFiles(directory=ASSETS / "web"), name="assets")
    for _, _, router in NAVIGATION:
        app.include_router(router)
    app.add_api_route("/", lambda: RedirectResponse(NAVIGATION[0][0], 303), include_in_schema=False)
    app.add_api_route(LOGIN, _login_page, methods=["GET"])
    app.add_api_route(LOGIN, _login, methods=["POST"])
    app.add_exception_handler(UserError, _explained)
    app.add_exception_handler(RequestValidationError, _invalid)
    return app


@asynccontextmanager
async def _with_queue(app: FastAPI) -> AsyncIterator[None]:
    ended = threading.Event()
    queue = threading.Thread(target=_run_queue, args=(app.state.jobs, ended), daemon=True)
    queue.start()
    yield
    ended.set()
    queue.join()


def _run_queue(jobs: Jobs, ended: threading.Event) -> None:
    said = ""
    while not ended.wait(_SECONDS):
        try:
            jobs.start_next()
            said = ""
        except (OSError, UserError) as error:  # a full disk; the page lives on, and the queue tries again
            if str(error) != said:
                say(f"warning: the queue waits: {error}")
            said = str(error)


def _login_page(request: Request) -> Response:
    access: Access = request.app.state.access
    return page(request, "login.html", title="Log in", with_password=access.password is not None, wrong=False)


async def _login(request: Request) -> Response:
    from starlette.concurrency import run_in_threadpool

    access: Access = request.app.state.access
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _LOGIN_BYTES:
            return Response("too long\n", 413)
    given = parse_qs(body.decode("utf-8", "replace")).get("password", [""])[0]
    if await run_in_threadpool(access.accepts, given, given):
        return admitted(access, "/")
    return page(request, "login.html", 403, title="Log in", with_password=access.password is not None, wrong=True)


async def _explained(request: Request, error: Exception) -> Response:
    """Answer a mistake with its lines, as the command line prints them."""
    assert isinstance(error, UserError)
    return JSONResponse({"problems": error.problems}, 403 if isinstance(error, Outside) else 422)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"problems": [f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()]}, 422)

"""Debian's Chromium, driven by Playwright, and pages for it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from sd3tune.ui.app import make_app
from sd3tune.ui.security import Access, read_key
from sd3tune.ui.workspace import Workspace

PROGRAM = "/usr/bin/chromium"
REQUIRED = os.environ.get("SD3TUNE_CHROMIUM") == "require"
"""Set where Chromium is installed for the tests, so that they fail, and are not skipped, without it."""
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
expect.set_options(timeout=60_000)  # milliseconds, for a busy machine
needs_chromium = pytest.mark.skipif(not REQUIRED and not Path(PROGRAM).exists(), reason=f"{PROGRAM} is not installed")

DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 360, "height": 740}
IMAGES = Path(__file__).parents[2] / "docs" / "images" / "ui"
WRITES_PICTURES = bool(os.environ.get("SD3TUNE_WRITE_SCREENSHOTS"))
"""Set to write the pictures of docs/ui.md anew."""
_LARGEST = 150_000
"""Bytes of a picture in the documentation."""


@contextmanager
def chromium(*more: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=[*ARGUMENTS, *more])
        yield browser
        browser.close()


@contextmanager
def served_here(folder: Path, port: int = 0) -> Iterator[str]:
    """The page in a thread of this process; its link. Its queue runs, too."""
    workspace = Workspace.opened_on([folder])
    access = Access(read_key(workspace.jobs), folder=str(workspace.root))
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    settings = uvicorn.Config(make_app(workspace, access), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/?token={access.token}"
    finally:
        server.should_exit = True
        thread.join(20)


def opened(browser: Browser, link: str, **options: object) -> tuple[BrowserContext, Page, list[str]]:
    """A window on the page, and the list of errors that its scripts report."""
    context = browser.new_context(**{"viewport": DESKTOP, **options})  # type: ignore[arg-type]
    context.set_default_timeout(120_000)  # milliseconds, for a busy machine
    page, errors = context.new_page(), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(link)
    return context, page, errors


def picture(page: Page, name: str, folder: Path, whole: bool = False) -> None:
    """Take a picture of the window for the documentation; only if it is asked for, and small enough."""
    if not WRITES_PICTURES:
        return
    page.screenshot(path=folder / "shot.png", full_page=whole)
    IMAGES.mkdir(parents=True, exist_ok=True)
    with Image.open(folder / "shot.png") as shot:
        shot.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)
    assert (IMAGES / f"{name}.png").stat().st_size < _LARGEST, name

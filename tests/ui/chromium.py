"""Debian's Chromium, driven by Playwright, and the page as users start it: a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

PROGRAM = "/usr/bin/chromium"
REQUIRED = os.environ.get("SD3TUNE_CHROMIUM") == "require"
"""Set where Chromium is installed for the tests, so that they fail, and are not skipped, without it."""
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
needs_chromium = pytest.mark.skipif(not REQUIRED and not Path(PROGRAM).exists(), reason=f"{PROGRAM} is not installed")

DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 360, "height": 740}
IMAGES = Path(__file__).parents[2] / "docs" / "images" / "ui"
WRITES_PICTURES = bool(os.environ.get("SD3TUNE_WRITE_SCREENSHOTS"))
"""Set to write the pictures of docs/ui.md anew."""
_LARGEST = 150_000
"""Bytes of a picture in the documentation."""


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def served(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`sd3tune ui FOLDER` as a process, and the link that it prints; it is stopped as Ctrl-C does."""
    program = [shutil.which("sd3tune") or sys.executable, *([] if shutil.which("sd3tune") else ["-m", "sd3tune"])]
    command = [*program, "ui", str(folder), "--no-browser", "--json", *(words or ("--port", "0"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, next(value["url"] for line in process.stdout if "url" in (value := json.loads(line)))
    finally:
        process.terminate()
        process.communicate(timeout=30)


def opened(browser: Browser, link: str, **options: object) -> tuple[BrowserContext, Page, list[str]]:
    """A window on the page, and the list of errors that its scripts report."""
    context = browser.new_context(**{"viewport": DESKTOP, **options})  # type: ignore[arg-type]
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

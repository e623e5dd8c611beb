"""Debian's Chromium, driven by Playwright, which brings none of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
_ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser. Without one, the tests are skipped, or fail with SD3TUNE_CHROMIUM=require.

    A process may have one Playwright at a time, and other modules start it with options of their own.
    """
    if not CHROMIUM.is_file():
        if os.environ.get("SD3TUNE_CHROMIUM") == "require":
            pytest.fail(f"{CHROMIUM} is missing: apt-get install chromium")
        pytest.skip(f"{CHROMIUM} is missing")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=_ARGUMENTS.split())
        yield browser
        browser.close()

"""A page opened on a folder, asked as a browser asks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from sd3tune.ui.app import make_app
from sd3tune.ui.security import Access, read_key
from sd3tune.ui.workspace import Workspace

SAME_SITE = {"sec-fetch-site": "same-origin", "accept": "application/json"}
OpenPage = Callable[..., TestClient]


@pytest.fixture
def open_page(monkeypatch: pytest.MonkeyPatch) -> OpenPage:
    """`open_page(folder, ...)`: a logged-in browser of the page on these folders; its queue does not run."""

    def opened(*folders: Path) -> TestClient:
        workspace = Workspace.opened_on(folders)
        monkeypatch.chdir(workspace.root)
        access = Access(read_key(workspace.jobs), folder=str(workspace.root))
        client = TestClient(make_app(workspace, access), base_url="http://127.0.0.1:7860", headers=SAME_SITE)
        client.cookies.set(access.cookie, access.token)
        return client

    return opened

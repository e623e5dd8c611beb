"""`sd3tune ui`: what keeps the page from opening."""

from __future__ import annotations

import io
import socket
import sys
from pathlib import Path

import pytest

from sd3tune.commands.ui import run_ui
from sd3tune.errors import ConfigError, RunError
from sd3tune.ui.jobs import PASSWORD


@pytest.fixture(autouse=True)
def _no_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)


def test_without_the_extra_a_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(RunError, match=r"needs FastAPI: pip install 'sd3tune\[ui\]' \(uvicorn is missing\)"):
        run_ui([Path()])


def test_other_machines_need_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"--host 0.0.0.0: needs a password: set {PASSWORD}"):
        run_ui([Path()], "0.0.0.0")
    monkeypatch.setenv(PASSWORD, "short")
    with pytest.raises(ConfigError, match=f"{PASSWORD}: has 5 characters; use 8 or more"):
        run_ui([Path()], "0.0.0.0")
    with pytest.raises(ConfigError, match="--password-file: missing cannot be read"):
        run_ui([Path()], password_file=Path("missing"))


def test_a_taken_port_and_a_missing_folder_are_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"--port {port}: Address already in use; choose another --port"):
            run_ui([Path()], port=port)
    with pytest.raises(ConfigError, match="no such folder"):
        run_ui([Path("missing")])

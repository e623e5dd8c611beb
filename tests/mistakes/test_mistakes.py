"""Every mistake is one line per problem that names the thing, exit code 2, no traceback, no run folder left behind.

The lines are collected in docs/messages.md, to be read as a user would. After a change of wording:

    SD3TUNE_WRITE_MESSAGES=1 .venv/bin/python -m pytest -n 0 tests/mistakes
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from sd3tune.cli.main import run
from tests.mistakes.cases import CASES, YAML, Case

DOCUMENT = Path(__file__).parents[2] / "docs" / "messages.md"
HEADER = """\
# What sd3tune says about mistakes

<!-- Written by tests/mistakes; see there. -->

Each line as printed after `error:`, with `...` for the folder it was printed in. The exit code is 2.
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 64), "orange").save(tmp_path / "photos" / "0.png")
    (tmp_path / "run.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_mistake_is_one_line_that_names_it(
    case: Case, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case.prepare()
    for name, value in case.environment:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["sd3tune", *case.command])
    with pytest.raises(SystemExit) as stopped:
        run()
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2, printed
    assert errors, printed
    assert any(case.says in line for line in errors), errors
    assert "Traceback" not in printed.out + printed.err
    assert not (workspace / "runs").exists()
    for line in errors:
        note(case, readable(line, workspace))


def readable(line: str, workspace: Path) -> str:
    """The line without what differs between machines."""
    text = line.removeprefix("error: ").replace(str(workspace), "...")
    return re.sub(r"/[^\s,;()'\"]*/bases/", ".../", text)


def note(case: Case, line: str) -> None:
    """The document has the line; or takes it in, when it is being written."""
    text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else HEADER
    if os.environ.get("SD3TUNE_WRITE_MESSAGES"):
        text = HEADER if case is CASES[0] else text
        heading = f"\n## {case.topic.capitalize()}\n"
        text += (f"{heading}\n" if heading not in text else "") + f"- *{case.name}*: `{line}`\n"
        DOCUMENT.write_text(text, encoding="utf-8")
        return
    assert f"`{line}`" in text, "docs/messages.md is not current; see the top of this file"

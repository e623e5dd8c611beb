"""`sd3tune report` writes one file, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Command


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_gets_its_page_in_its_folder_and_several_a_comparison_here(
    copied: Path, of_earlier_version: Path, command: Command
) -> None:
    done = command("report", "runs/rex", "--json")
    assert done.code == 0
    assert json.loads(done.out)["report"] == "runs/rex/report.html"
    assert (copied / "report.html").read_text("utf-8").startswith("<!doctype html>")
    done = command("report", "runs/rex", of_earlier_version)
    assert done.out == "report    comparison.html\n"
    page = Path("comparison.html").read_text("utf-8")
    assert "runs/rex" in page
    assert "written/lora" in page
    assert command("report", "runs/rex", "--out", "a/b.html").code == 0
    assert Path("a/b.html").is_file()
    assert not list(Path.cwd().rglob(".tmp-*"))


def test_a_wrong_folder_is_one_line_and_nothing_is_written(copied: Path, command: Command) -> None:
    Path("empty").mkdir()
    for words, problem in {
        ("empty",): "empty: not a run folder",
        ("runs/rex", "missing"): "missing: not a run folder",
        ("runs/rex", "runs/../runs/rex"): "the same run is named twice",
        ("runs/rex", "--out", "empty"): "--out: empty is a folder",
    }.items():
        done = command("report", *words)
        assert done.code == 2, words
        assert problem in done.err.splitlines()[-1]
    assert not list(Path.cwd().rglob("*.html"))

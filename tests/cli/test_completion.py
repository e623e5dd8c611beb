"""The shell completes verbs, configurations, run folders and shipped configurations."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.run.test_listing import write_run
from tests.run_files import CONSOLE_SCRIPT


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with runs and configurations."""
    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    write_run(folder / "runs" / "rex")
    write_run(folder / "runs" / "cat")
    (folder / "runs" / "rex" / "config.yaml").touch()
    (folder / "rex.yaml").touch()
    (folder / "rex.txt").touch()
    (folder / ".hidden.yaml").touch()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("tr", ["train"]),
        ("config ch", ["check"]),
        ("train ", ["rex.yaml", "runs/"]),
        ("train runs/rex/", ["runs/rex/checkpoints/", "runs/rex/config.yaml"]),
        ("cache encode re", ["rex.yaml"]),
        ("report r", ["runs/cat", "runs/rex"]),
        ("hub push runs/c", ["runs/cat"]),
        ("eval ru", ["runs/cat", "runs/rex"]),
        ("config new a --from sd35_large_l", ["sd35_large_lora"]),
        ("train missing/", []),
    ],
)
def test_words_are_completed(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch, typed: str, completed: list[str]
) -> None:
    words = f"sd3tune {typed}".split(" ")
    monkeypatch.setenv("_SD3TUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    done = command()
    assert (done.code, done.err) == (0, "")
    assert sorted(done.out.split()) == completed


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is missing")
def test_bash_completes_with_the_script_that_is_shown(here: Path) -> None:
    script = (
        'eval "$(_SD3TUNE_COMPLETE=source_bash sd3tune)"; COMP_WORDS=(sd3tune report runs/r) COMP_CWORD=2; '
        '_sd3tune_completion sd3tune; echo "${COMPREPLY[@]}"'
    )
    path = f"{Path(CONSOLE_SCRIPT).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path}, check=True
    )
    assert done.stdout.split() == ["runs/rex"], done.stderr

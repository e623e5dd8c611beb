"""Every mistake is one line per problem that names the thing, exit code 2, no traceback, no run folder left behind.

The lines are collected in docs/messages.md, to be read as a user would. After a change of wording:

    SD3TUNE_WRITE_MESSAGES=1 .venv/bin/python -m pytest -n 0 -m "long or not long" tests/mistakes
"""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from sd3tune.cli.main import run
from sd3tune.model.base.resolve import resolve_base
from tests.mistakes.cases import CASES, YAML, Case
from tests.mistakes.environment import ENVIRONMENT, ProcessCase
from tests.mistakes.process import ROOT, Finished, Unable, forked, fresh, small_files

DOCUMENT = Path(__file__).parents[2] / "docs" / "messages.md"
FRESH = "no network"
"""The one case in a new interpreter in `make test`; they take three seconds each, so the others are long."""
HEADER = """\
# Messages about mistakes

<!-- Written by tests/mistakes; see there. -->

Each line as printed after `error:`, with `...` for the folder it was printed in. The exit code is 2.
"""


def is_long(case: ProcessCase) -> bool:
    return case.new_interpreter and case.name != FRESH


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 64), "orange").save(tmp_path / "photos" / "0.png")
    (tmp_path / "run.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for processes, wherever they are started
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


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.long] * is_long(case)) for case in ENVIRONMENT],
    ids=lambda case: case.name.replace(" ", "-"),
)
def test_what_a_machine_lacks_is_one_line_of_a_real_process_too(
    case: ProcessCase, workspace: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    resolve_base("tiny")  # built before it is asked for by processes whose rights or disks are small
    case.prepare()
    notes = tmp_path_factory.mktemp("notes")
    with case.around() as more:
        finished = started(case, workspace, {**bare_environment(), **more, **dict(case.environment)}, notes)
    errors = [line for line in finished.printed.splitlines() if line.startswith("error: ")]
    assert finished.code == 2, finished.printed
    assert len(errors) == 1, finished.printed
    assert case.says in errors[0]
    assert "Traceback" not in finished.printed
    assert finished.after == finished.before
    note(case, readable(errors[0], workspace))


def test_what_cannot_be_written_in_the_middle_of_a_run_is_one_line_and_nothing_is_half_there(
    workspace: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    resolve_base("tiny")
    command = ("train", "run.yaml", "method.rank=64")
    limit = partial(small_files, 200_000)
    finished = forked(command, workspace, bare_environment(), limit, tmp_path_factory.mktemp("notes"))
    (error,) = [line for line in finished.printed.splitlines() if line.startswith("error: ")]
    assert finished.code == 2, finished.printed
    folder = workspace / "runs" / "mistake" / "checkpoints"
    assert error == f"error: {folder}: cannot write here: File too large; free some space and run again"
    assert "Traceback" not in finished.printed
    assert list(folder.iterdir()) == []
    again = forked(command, workspace, bare_environment(), bool, tmp_path_factory.mktemp("notes"))
    assert again.code == 0, again.printed
    assert (workspace / "runs" / "mistake" / "adapter").is_dir()


def started(case: ProcessCase, workspace: Path, environment: dict[str, str], notes: Path) -> Finished:
    try:
        if not case.new_interpreter:
            return forked(case.command, workspace, environment, case.inside, notes)
    except Unable as reason:
        pytest.skip(f"this machine does not allow it: {reason}")
    if case.absent is not None:
        (notes / "sitecustomize.py").write_text(HIDING.format(name=case.absent))
    return fresh(case.command, workspace, environment, notes)


def bare_environment() -> dict[str, str]:
    """Without what a machine's owner may have set for the Hub and for launches."""
    theirs = ("HF_", "HUGGING", "ACCELERATE_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_")
    return {name: value for name, value in os.environ.items() if not name.startswith(theirs)} | {"OMP_NUM_THREADS": "1"}


HIDING = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *more):
        return None if name.split(".")[0] == {name!r} else self.finder.find_spec(name, *more)

    def find_distributions(self, context, *more):
        found = getattr(self.finder, "find_distributions", lambda *_: ())
        return () if context.name == {name!r} else found(context, *more)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""
"""A `sitecustomize` for an interpreter in which a library is not installed."""


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

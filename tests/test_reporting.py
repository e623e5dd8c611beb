r"""What is printed: a message is one line, a name in it cannot move the cursor, and all of it goes to one reporter."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import pytest

import sd3tune
from sd3tune.errors import LONGEST, DataError
from sd3tune.reporting import (
    JsonReporter,
    NotebookReporter,
    Reporter,
    current,
    escaped,
    loading,
    progress_bar,
    result,
    say,
    using,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x\x1b[2J\x1b]0;owned\x07", r"x\x1b[2J\x1b]0;owned\x07"),
        ("a.png\nerror: forged", r"a.png\nerror: forged"),
        ("100 %\rdone", r"100 %\rdone"),
        ("\x9b31m red in eight bits", r"\x9b31m red in eight bits"),
        ("a\x85b\u2028c\u2029d\x0be\x0cf", r"a\x85b\u2028c\u2029d\x0be\x0cf"),
        ("gpj.\u202egnp.a\u202c \u2066x\u2069", r"gpj.\u202egnp.a\u202c \u2066x\u2069"),
        ("nul\0 back\b delete\x7f", r"nul\x00 back\x08 delete\x7f"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\xe9.png"),
        ("half \ud800 a character", r"half \ud800 a character"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text: str, shown: str) -> None:
    assert escaped(text) == shown
    assert escaped(shown) == shown
    shown.encode("utf-8")


@pytest.mark.parametrize(
    "text",
    ["plain", "C:\\photos\\new\\x1b", "tab\tstop", "日本語 é 👩\u200d🚀", "עברית\u200f", "می\u200cخواهم", ""],  # noqa: RUF001
)
def test_text_that_only_shows_itself_stays(text: str) -> None:
    assert escaped(text) == text


def test_each_argument_is_one_line(capsys) -> None:
    say("first\nerror: forged", Path("a\rb"), 3, "")
    assert capsys.readouterr().out == "first\\nerror: forged\na\\rb\n3\n\n"
    with progress_bar(desc="a\x1b[2J", total=2):
        say("x\ny\x1b[2J")
        say("z\n", aside=True)
    printed = capsys.readouterr()
    assert printed.out == "x\\ny\\x1b[2J\n"
    assert "z\\n\n" in printed.err
    assert r"a\x1b[2J: " in printed.err
    assert "\x1b[2J" not in printed.err


def test_an_error_is_one_line_for_python_too() -> None:
    error = DataError("p/a\nerror: forged: is empty", "b\x1b[2J")
    assert error.problems == (r"p/a\nerror: forged: is empty", r"b\x1b[2J")
    assert str(error) == "p/a\\nerror: forged: is empty\nb\\x1b[2J"


def test_nothing_in_the_package_prints_past_it() -> None:
    """Linting forbids `print`; these would go past that."""
    package = Path(sd3tune.__file__).parent
    calls = {
        f"{path.relative_to(package)}: {ast.unparse(node.func)}"
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func)
        in ("print", "tqdm.write", "tqdm", "typer.echo", "sys.stdout.write", "sys.stderr.write", "pprint", "click.echo")
    }
    assert calls == {"reporting.py: print", "config/reference.py: sys.stdout.write"}


def everything() -> None:
    """One of each kind, as commands report them."""
    say("about to train", "", "note: n", "warning: w", "error: e")
    say("note: how the configuration came about", aside=True)
    with loading("train x.yaml: loading"):
        pass
    with progress_bar(desc="encoding", total=4, unit="text", mininterval=0) as bar:
        bar.update(1)
        bar.set_postfix(loss="0.5", lr="1.0e-04", of="rex", refresh=False)
        bar.update(3)
    result("adapter   runs/x", Path("warning: a file"), steps=4, run=Path("runs/x"))


def test_a_terminal_gets_lines_and_bars(capsys) -> None:
    with using(Reporter()):
        everything()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "about to train", "", "note: n", "warning: w", "adapter   runs/x", "warning: a file",
    ]  # fmt: skip
    assert printed.err.startswith("error: e\nnote: how the configuration came about\ntrain x.yaml: loading ...\n")
    assert "encoding: 100%" in printed.err


def test_quiet_leaves_what_a_script_needs(capsys) -> None:
    with using(Reporter(quiet=True)):
        everything()
    printed = capsys.readouterr()
    assert printed.out == "warning: w\nadapter   runs/x\nwarning: a file\n"
    assert printed.err == "error: e\n"


def objects(capsys) -> list[dict]:
    printed = capsys.readouterr()
    assert printed.err == ""
    return [json.loads(line) for line in printed.out.splitlines()]


def test_machines_get_an_object_a_line(capsys) -> None:
    with using(JsonReporter()):
        everything()
    found = objects(capsys)
    messages = [(one["kind"], one["text"]) for one in found if one["kind"] != "progress"]
    assert messages == [
        ("line", "about to train"),
        ("note", "n"),
        ("warning", "w"),
        ("error", "e"),
        ("note", "how the configuration came about"),
        ("result", "adapter   runs/x"),
        ("result", "warning: a file"),
    ]
    assert found[-1] == {"kind": "result", "text": "warning: a file", "steps": 4, "run": "runs/x"}
    waiting, *bars = (one for one in found if one["kind"] == "progress")
    assert waiting["text"] == "train x.yaml: loading"
    assert {one["text"] for one in bars} == {"encoding"}
    assert [one["done"] for one in bars][:: len(bars) - 1] == [0, 4]
    last = bars[-1]
    assert (last["total"], last["unit"], last["loss"], last["lr"], last["of"]) == (4, "text", 0.5, 1e-4, "rex")
    assert last["seconds"] >= 0
    assert last["seconds_left"] == 0


def test_machines_that_want_results_alone_get_no_progress(capsys) -> None:
    with using(JsonReporter(quiet=True)):
        everything()
    assert [one["kind"] for one in objects(capsys)] == ["warning", "error", "result", "result"]


def test_an_object_holds_what_a_terminal_would_obey_as_text(capsys) -> None:
    with using(JsonReporter()):
        say("x\x1b[2J\n日本")
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed)["text"] == r"x\x1b[2J\n日本"


def test_a_notebook_gets_its_own_bars(capsys) -> None:
    from tqdm.auto import tqdm

    with using(NotebookReporter()):
        assert type(progress_bar(desc="encoding", total=1)) is tqdm
        everything()
    assert "adapter   runs/x" in capsys.readouterr().out


def test_a_reporter_can_be_ones_own_and_the_former_one_comes_back() -> None:
    class Kept(Reporter):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[tuple] = []

        def message(self, kind, text, values, aside) -> None:
            self.found.append((kind, text, values))

    before = current()
    with using(Kept()) as kept:
        result("done", steps=3)
    assert kept.found == [("result", "done", {"steps": 3})]
    assert type(current()) is type(before)


def test_on_a_terminal_the_seconds_are_counted(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with loading("plan run.yaml: loading"):
        pass
    assert capsys.readouterr().err == "\rplan run.yaml: loading 0 s\n"


def test_of_several_processes_the_first_one_says_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    with loading("train run.yaml: loading"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("length", [LONGEST - 1, LONGEST, LONGEST + 1, 10**6])
def test_an_error_keeps_its_beginning_and_its_end(length: int) -> None:
    whole = "file:1: " + "x" * (length - 20) + "; do it here"
    (line,) = DataError(whole).problems
    assert len(line) == min(length, LONGEST)
    assert (line == whole) == (length <= LONGEST)
    assert line.startswith("file:1: x")
    assert line.endswith("x; do it here")

r"""What is printed: a message is one line, and a name in it cannot move the cursor."""

from __future__ import annotations

import ast
import io
import os
from pathlib import Path

import pytest

import sd3tune
from sd3tune.errors import LONGEST, DataError
from sd3tune.terminal import escaped, say, say_above_bars


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
    said = io.StringIO()
    say("first\nerror: forged", Path("a\rb"), 3, "", to=said)
    assert said.getvalue() == "first\\nerror: forged\na\\rb\n3\n\n"
    say_above_bars("x\ny\x1b[2J")
    say("z\n")
    assert capsys.readouterr().out == "x\\ny\\x1b[2J\nz\\n\n"


def test_an_error_is_one_line_for_python_too() -> None:
    error = DataError("p/a\nerror: forged: is empty", "b\x1b[2J")
    assert error.problems == (r"p/a\nerror: forged: is empty", r"b\x1b[2J")
    assert str(error) == "p/a\\nerror: forged: is empty\nb\\x1b[2J"


@pytest.mark.parametrize("length", [LONGEST - 1, LONGEST, LONGEST + 1, 10**6])
def test_an_error_keeps_its_beginning_and_its_end(length: int) -> None:
    whole = "file:1: " + "x" * (length - 20) + "; do it here"
    (line,) = DataError(whole).problems
    assert len(line) == min(length, LONGEST)
    assert (line == whole) == (length <= LONGEST)
    assert line.startswith("file:1: x")
    assert line.endswith("x; do it here")


def test_nothing_in_the_package_prints_past_it() -> None:
    """Linting forbids `print`; these would go past that."""
    package = Path(sd3tune.__file__).parent
    calls = {
        f"{path.relative_to(package)}: {ast.unparse(node.func)}"
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func)
        in ("print", "tqdm.write", "typer.echo", "sys.stdout.write", "sys.stderr.write", "pprint", "click.echo")
    }
    assert calls == {"terminal.py: print", "terminal.py: tqdm.write", "config/reference.py: sys.stdout.write"}

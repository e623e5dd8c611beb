"""Colours and pictures go to terminals that want them, and to nothing else; seen through a real pseudo-terminal."""

from __future__ import annotations

import base64
import os
import pty
import re
import subprocess
import sys

import pytest

from sd3tune import terminal

SCRIPT = """
import sys
from sd3tune.cli.main import run
for arguments in (["--help"], ["config", "check", "missing.yaml"]):
    sys.argv = ["sd3tune", *arguments]
    try: run()
    except SystemExit: pass
"""
PREVIEW = """
from sd3tune.reporting import JsonReporter, Reporter, show_picture, using
for reporter in (Reporter(), Reporter(quiet=True), JsonReporter()):
    with using(reporter): show_picture("preview   a.png", lambda: b"PNG" * 3000)
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7][0-9;]*m")
KEYS = {"NO_COLOR", "FORCE_COLOR", "TERM", "TERM_PROGRAM", "KITTY_WINDOW_ID", "TMUX", "GITHUB_ACTIONS", "PY_COLORS"}


def printed(script: str, on_terminal: bool = True, **environment: str) -> str:
    """The output of a Python process, on a pseudo-terminal or in a pipe."""
    settings = {name: value for name, value in os.environ.items() if name not in KEYS} | environment
    command = [sys.executable, "-c", script]
    if not on_terminal:
        return subprocess.run(command, env=settings, stdout=-1, stderr=subprocess.STDOUT, text=True, check=True).stdout
    main, side = pty.openpty()
    with subprocess.Popen(command, env=settings, stdin=side, stdout=side, stderr=side):
        os.close(side)
        found = b""
        while True:
            try:
                part = os.read(main, 2**16)
            except OSError:  # the process has ended
                break
            if not part:
                break
            found += part
    os.close(main)
    return found.decode()


@pytest.mark.parametrize(
    ("environment", "on_terminal", "coloured"),
    [
        ({"TERM": "xterm-256color"}, True, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "xterm-256color"}, False, False),
        ({"TERM": "xterm-256color", "FORCE_COLOR": "1"}, False, True),
    ],
)
def test_help_and_errors_have_colours_where_a_terminal_wants_them(
    environment: dict[str, str], on_terminal: bool, coloured: bool
) -> None:
    text = printed(SCRIPT, on_terminal, **environment)
    of_help, _, of_error = text.partition("Exit codes")
    error = next(line for line in of_error.splitlines() if "missing.yaml" in line)
    assert "train" in of_help
    assert (COLOUR.search(of_help) is not None) is coloured
    assert error.startswith("\x1b[1;31merror:\x1b[0m missing.yaml" if coloured else "error: missing.yaml")


def test_a_preview_is_drawn_where_it_can_be_else_named_and_never_in_a_pipe() -> None:
    assert printed(PREVIEW, TERM="xterm") == "preview   a.png\r\n"
    drawn = printed(PREVIEW, TERM="xterm-kitty")
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", drawn)
    assert [keys for keys, _ in chunks] == ["a=T,f=100,r=8,q=2,m=1", "m=1", "m=0"]
    assert base64.b64decode("".join(data for _, data in chunks)) == b"PNG" * 3000
    assert "a.png" not in drawn
    assert printed(PREVIEW, on_terminal=False, TERM="xterm-kitty") == ""


def test_the_terminal_is_known_by_its_environment() -> None:
    assert terminal.picture_protocol({"TERM_PROGRAM": "iTerm.app"}) == "iterm2"
    assert terminal.picture_protocol({"TERM_PROGRAM": "ghostty", "TERM": "xterm-256color"}) == "kitty"
    assert terminal.picture_protocol({"KITTY_WINDOW_ID": "1", "TMUX": "/tmp/x"}) is None
    assert terminal.picture_protocol({"TERM": "xterm-256color"}) is None
    assert terminal.picture(b"PNG", "iterm2") == "\x1b]1337;File=inline=1;height=8;size=3:UE5H\x07"

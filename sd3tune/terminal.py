"""What a terminal can show: colours, and pictures by the protocols of kitty and iTerm2."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from typing import Literal, TextIO

Protocol = Literal["kitty", "iterm2"]

_COLOURS = {"error": "1;31", "warning": "33", "note": "36"}
"""Kind of a line -> the codes of its first word."""
_KITTY = ("ghostty", "kitty")
_ITERM2 = ("iTerm.app", "WezTerm")
_ROWS = 8
"""Height of a picture, in lines of text."""
_CHUNK = 4096
"""Characters of a picture in one of kitty's commands."""


def wants_colour(stream: TextIO) -> bool:
    """Return True for a terminal that is not `dumb`. NO_COLOR turns colours off, and FORCE_COLOR on."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (os.environ.get("TERM") != "dumb" and stream.isatty())


def coloured(text: str, kind: str, stream: TextIO) -> str:
    """Return a line that begins with its kind, such as `error: `, with that word coloured if `stream` wants it."""
    if kind not in _COLOURS or not wants_colour(stream):
        return text
    return f"\x1b[{_COLOURS[kind]}m{kind}:\x1b[0m{text.removeprefix(f'{kind}:')}"


def picture_protocol(environment: Mapping[str, str]) -> Protocol | None:
    """Return how this terminal draws pictures; None if it cannot, and in tmux and screen, which pass none on."""
    program, term = environment.get("TERM_PROGRAM", ""), environment.get("TERM", "")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return None
    if "KITTY_WINDOW_ID" in environment or program in _KITTY or any(name in term for name in _KITTY):
        return "kitty"
    return "iterm2" if program in _ITERM2 else None


def picture(png: bytes, protocol: Protocol) -> str:
    """Return the characters that draw a picture, a few lines high.

    Sources: sw.kovidgoyal.net/kitty/graphics-protocol and iterm2.com/documentation-images.html.
    """
    data = base64.b64encode(png).decode()
    if protocol == "iterm2":
        return f"\x1b]1337;File=inline=1;height={_ROWS};size={len(png)}:{data}\x07"
    return "".join(_for_kitty(data))


def _for_kitty(data: str) -> Iterator[str]:
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    for number, chunk in enumerate(chunks):
        keys = f"a=T,f=100,r={_ROWS},q=2," if number == 0 else ""
        yield f"\x1b_G{keys}m={int(number < len(chunks) - 1)};{chunk}\x1b\\"

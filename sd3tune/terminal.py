"""All that is printed: a message is a line, and nothing in it moves the cursor or begins another line."""

from __future__ import annotations

import re
import sys
from typing import TextIO

_HIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls except the tab, line and paragraph separators, overrides of the writing direction, halves of characters."""
_SHORT = {"\n": r"\n", "\r": r"\r"}


def escaped(text: str) -> str:
    r"""Return the text with each control character written out: `\x1b`, `\n`, `\u202e`.

    A byte of a file name that is not UTF-8, which Python holds as half a character, becomes `\xe9`. Text without such
    characters, backslashes included, stays as it is, so that escaping again changes nothing.
    """
    return _HIDDEN.sub(lambda found: _written_out(found[0]), text)


def say(*lines: object, to: TextIO | None = None, flush: bool = False) -> None:
    """Print the lines, escaped, to stdout or `to`: a line break inside one of them begins no new line."""
    for line in lines:
        print(escaped(str(line)), file=to or sys.stdout, flush=flush)


def say_over(line: str) -> None:
    """Print a line, escaped, to stderr, where the next one takes its place."""
    to: TextIO = sys.stderr
    print(f"\r{escaped(line)}", end="", file=to, flush=True)


def say_above_bars(line: str) -> None:
    """Print a line, escaped, while progress bars are shown."""
    from tqdm import tqdm

    tqdm.write(escaped(line))


def _written_out(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how `surrogateescape` holds a byte
        code -= 0xDC00
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")

"""Markdown around texts that may hold anything: backticks, pipes, line breaks, what cannot be printed.

CommonMark (https://spec.commonmark.org/0.31.2/#code-spans) and GitHub's tables
(https://github.github.com/gfm/#tables-extension-), which the Hub renders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def code(text: str) -> str:
    """Inline code on one line, between more backticks than are in it; runs of white space are one blank."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text).split())
    fence = "`" * (_longest_run(line) + 1)
    blank = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{blank}{line}{blank}{fence}" if line else "(blank)"


def fenced(language: str, text: str) -> str:
    """A block of code, between more backticks than are in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown, of one line each."""
    lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" if any(line) else "| " * len(line) + "|" for line in lines)


def _cell(markdown: str) -> str:
    """A pipe ends a cell unless a backslash, itself not escaped, stands before it; in code as elsewhere."""
    return re.sub(r"\\(?=\|)", r"\\ ", markdown).replace("|", r"\|")


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)

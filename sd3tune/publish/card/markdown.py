"""Markdown for arbitrary texts, with backticks, pipes, line breaks and unprintable characters.

CommonMark (https://spec.commonmark.org/0.31.2/#code-spans) and GitHub's tables
(https://github.github.com/gfm/#tables-extension-), which the Hub renders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def code(text: str) -> str:
    """Return inline code on one line, in more backticks than it contains, with white space collapsed."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text).split())
    fence = "`" * (_longest_run(line) + 1)
    blank = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{blank}{line}{blank}{fence}" if line else "(blank)"


def fenced(language: str, text: str) -> str:
    """Return a code block, fenced by more backticks than it contains."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; each cell is one line of Markdown."""
    lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" if any(line) else "| " * len(line) + "|" for line in lines)


def _cell(markdown: str) -> str:
    """Return a cell with pipes escaped: an unescaped pipe ends a cell, even in code."""
    return re.sub(r"\\(?=\|)", r"\\ ", markdown).replace("|", r"\|")


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)

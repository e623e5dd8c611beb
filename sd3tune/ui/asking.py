"""Commands that only answer a question, such as `plan` and `data check`: run at once, one at a time."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd3tune.invocation import command_line, program
from sd3tune.reporting import say
from sd3tune.ui.jobs import environment

_SECONDS = 600
_ONE = threading.Lock()
"""Each loads PyTorch, so they wait for one another."""


def answer(words: Sequence[str], where: Path) -> dict[str, Any]:
    """Run `sd3tune WORDS...` in a folder; return the command, its exit code, and the lines that it prints.

    The page's own process never loads PyTorch, so it starts quickly and holds no memory of a GPU.
    """
    command = command_line("sd3tune", *words)
    with _ONE:
        say(f"$ {command}")
        try:
            done = subprocess.run(
                [*program(), *words],
                cwd=where,
                env=environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"command": command, "code": 1, "lines": [f"error: no answer after {_SECONDS} s"]}
    lines = done.stdout.splitlines()
    if done.returncode:
        lines += [line for line in done.stderr.splitlines() if line.startswith("error: ")] or done.stderr.splitlines()
    return {"command": command, "code": done.returncode, "lines": lines}

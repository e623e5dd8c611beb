"""Commands to print: each works as it stands in the shell that the user is in."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import sys
from pathlib import Path


def command_line(program: str, *words: str) -> str:
    """Return `PROGRAM WORDS...` quoted for a POSIX shell; `program` is one of this environment, such as `sd3tune`.

    It is called by its name where PATH leads to it, as in an activated environment, else by its path. Without a script
    of its own, `sd3tune` is `PYTHON -m sd3tune`; another program keeps its bare name.
    """
    called = _called(program, sys.executable, os.environ.get("PATH", os.defpath), Path.cwd())
    return " ".join([called, *map(shlex.quote, words)])


@functools.lru_cache
def _called(program: str, python: str, path: str, folder: Path) -> str:
    environment = Path(python).parent
    if (environment / program).is_file():
        return _shortest(environment / program, path, folder)
    if program != "sd3tune":
        return program
    return f"{_shortest(Path(python), path, folder)} -m sd3tune"


def _shortest(file: Path, path: str, folder: Path) -> str:
    """Return the program's bare name, its path from the current folder, or its whole path."""
    if shutil.which(file.name, path=path) == str(file):
        return file.name
    return shlex.quote(str(file.relative_to(folder) if file.is_relative_to(folder) else file))

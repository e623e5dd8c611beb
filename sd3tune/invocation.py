"""Commands of this installation: printable ones, and the words that start one."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import sys
from pathlib import Path


def command_line(program: str, *words: str) -> str:
    """Return `PROGRAM WORDS...` quoted for a POSIX shell; `program` belongs to this environment, such as `sd3tune`.

    It is called by name if PATH leads to it, as in an activated environment, else by its path. If its script is
    missing, `sd3tune` becomes `PYTHON -m sd3tune`, and other programs keep their name.
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
    """Return the shortest form that works: the program's name, its path from the current folder, or its full path."""
    if shutil.which(file.name, path=path) == str(file):
        return file.name
    return shlex.quote(str(file.relative_to(folder) if file.is_relative_to(folder) else file))


def program() -> list[str]:
    """Return the words that start sd3tune; never through the working directory, which Python would import from."""
    script = Path(sys.executable).with_name("sd3tune")
    return [str(script)] if script.is_file() else [sys.executable, str(Path(__file__).with_name("__main__.py"))]

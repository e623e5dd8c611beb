"""Text without secrets: tokens, the home folder, and the names of this machine and its user."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TOKENS = re.compile(r"\b(?:hf_|ghp_|github_pat_|sk-|glpat-)[A-Za-z0-9_-]{8,}")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 6
"""Characters of the shortest secret or name that is searched for: a shorter one would be found inside words."""
HIDDEN = "[hidden]"


def without_secrets(value: Any) -> Any:
    """Return the nested value with secrets in its texts replaced, in keys as well."""
    return _replaced(value, list(_secrets()))


def shown_command(argv: Any) -> str:
    """Return a command line without folders: each path is reduced to its last part, also in `key=/a/path`."""
    words = [word for word in argv if isinstance(word, str)] if isinstance(argv, list) else []
    return " ".join(re.sub(r"(?:(?<==)|^)(?:/|~|[A-Za-z]:\\).*[/\\](?=.)", "", word) for word in words)


def _replaced(value: Any, secrets: list[tuple[str, str]]) -> Any:
    if isinstance(value, str):
        for secret, shown in secrets:
            value = value.replace(secret, shown)
        return _CREDENTIALS.sub(f"{HIDDEN}@", _TOKENS.sub(HIDDEN, value))
    if isinstance(value, dict):
        return {_replaced(name, secrets): _replaced(inner, secrets) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(inner, secrets) for inner in value]
    return value


def _secrets() -> Iterator[tuple[str, str]]:
    """Yield each secret of this machine and what is shown in its place; the longest come first."""
    found = {value: HIDDEN for name, value in os.environ.items() if _SECRET_NAMES.search(name)}
    try:
        found[str(Path.home())] = "~"
        found[socket.gethostname()] = HIDDEN
        found[getpass.getuser()] = HIDDEN
    except (OSError, KeyError, RuntimeError):
        pass  # a user without a name or a home has none to hide
    yield from sorted(((of, by) for of, by in found.items() if len(of) >= _SHORTEST), key=lambda one: -len(one[0]))

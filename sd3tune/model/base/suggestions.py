"""Suggestions for a base that was not found."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from sd3tune.errors import ModelError
from sd3tune.model.base.offline import OFFLINE
from sd3tune.model.base.parts import VARIANTS

_SPELLINGS = re.compile(
    r"(?:sd|stable-?diffusion)?-?v?3(\.?5)?-?(?:m(?:edium)?|(l)(?:arge)?)?-?(turbo)?(?:-?diffusers)?", re.IGNORECASE
)


def released(name: str) -> str | None:
    """Return the Hub id of the released model meant by a name such as `sd3` or `sd35_large_turbo`, or None."""
    found = _SPELLINGS.fullmatch(re.sub(r"[_ ]", "-", name))
    if found is None:
        return None
    half, large, turbo = found.groups()
    if large or turbo:
        return f"{VARIANTS['sd35-large']}{'-turbo' if turbo else ''}" if half else None
    return VARIANTS["sd35-medium" if half else "sd3-medium"]


def suggestion(path: Path) -> str:
    """Return the end of a message about a base that does not exist: a released model, an offline base, or a folder."""
    try:
        siblings = {str(path.parent / found.name) for found in path.parent.iterdir() if found.is_dir()}
    except OSError:
        siblings = set()
    close = difflib.get_close_matches(str(path), [*VARIANTS, *OFFLINE, *siblings], n=1)
    meant = released(path.name) or next((VARIANTS.get(name, name) for name in close), None)
    return f"; did you mean {meant!r}?" if meant else f"; the offline bases are {', '.join(OFFLINE)}"


@contextlib.contextmanager
def suggest_released(repository: str) -> Iterator[None]:
    """Add the right Hub id to a ModelError about another spelling of a released model, or about its single files."""
    owner, _, name = repository.partition("/")
    meant = released(name) if owner == "stabilityai" else None
    try:
        yield
    except ModelError as error:
        if meant is None or meant == repository:
            raise
        raise ModelError(*(f"{line}; did you mean {meant!r}?" for line in error.problems)) from error

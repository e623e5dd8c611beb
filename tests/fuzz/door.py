"""Trying a door: files as strangers could make them, in one process.

Every call ends in success or in a UserError of short, single lines, within the bounds of `bounds.guarded`. Each door is
tried with the same few examples and with those that failed once; then, with SD3TUNE_FUZZ_SECONDS, for as long with
other ones.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st

from sd3tune.errors import LONGEST, UserError
from sd3tune.reporting import escaped
from tests.fuzz.bounds import Hang, guarded
from tests.fuzz.progress import Progress

Example = TypeVar("Example")

SECONDS = float(os.environ.get("SD3TUNE_FUZZ_SECONDS", "0"))
SEED = os.environ.get("SD3TUNE_FUZZ_SEED")
"""Of one round that is to be repeated, instead of all else."""
TRIED: dict[str, Progress] = {}
_FEW, _ROUND = 25, 200
_COMMON = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False)


def try_door(
    name: str,
    examples: st.SearchStrategy[Example],
    call: Callable[[Example], object],
    folder: Path,
    known: Iterable[Example] = (),
    few: int = _FEW,
) -> None:
    """Give `call` examples. Fails with the smallest that raises anything but a UserError or leaves its bounds.

    `folder` is the only place to write to. `known` are examples that are always tried; of drawn ones `few` are.
    """
    progress = TRIED[name] = Progress(name)

    def once(example: Example) -> None:
        with progress.counting() as outcome:
            try:
                with guarded(folder):
                    call(example)
                outcome.is_accepted()
            except UserError as error:
                _check_lines(error)
                outcome.is_refused()
            except Hang:
                print(f"{name} hangs: {example!r}")
                raise

    if SEED is not None:
        seed(int(SEED))(settings(_COMMON, max_examples=_ROUND)(given(examples)(once)))()
        return
    first = given(examples)(once)
    for one in known:
        first = example(one)(first)
    settings(_COMMON, max_examples=few, derandomize=True, phases=_ALWAYS)(first)()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        progress.seed = secrets.randbits(64)
        seed(progress.seed)(settings(_COMMON, max_examples=_ROUND)(given(examples)(once)))()
    progress.write()


_ALWAYS = (Phase.explicit, Phase.generate, Phase.shrink)


def _check_lines(error: UserError) -> None:
    assert error.problems
    for line in error.problems:
        assert line.strip()
        assert escaped(line) == line, ascii(line)
        assert len(line) <= LONGEST, line

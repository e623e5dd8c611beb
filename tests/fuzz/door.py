"""Trying a door: files as strangers could make them, in one process.

Every call ends in success or in a UserError of short, single lines, in about a second. Each door is tried with the same
few examples, or, with SD3TUNE_FUZZ_SECONDS, for as long with other ones.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from sd3tune.errors import UserError

Example = TypeVar("Example")

SECONDS = float(os.environ.get("SD3TUNE_FUZZ_SECONDS", "0"))
CALLS: dict[str, list[int]] = {}
"""Door -> how many calls were made, and how many were refused."""
_FEW, _MANY = 25, 500
_HANGING = 20
"""Seconds after which a call hangs, on however busy a machine."""


def try_door(name: str, examples: st.SearchStrategy[Example], call: Callable[[Example], object]) -> None:
    """Give `call` examples. Fails with the smallest that raises anything but a UserError, or that hangs."""

    def once(example: Example) -> None:
        counts = CALLS.setdefault(name, [0, 0])
        counts[0] += 1
        try:
            with _alarm(name):
                call(example)
        except UserError as error:
            counts[1] += 1
            for line in error.problems:
                assert "\n" not in line, line
                assert len(line) < 2000, line

    common = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    settings(common, max_examples=_FEW, derandomize=True, phases=(Phase.generate, Phase.shrink))(
        given(examples)(once)
    )()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        seed(secrets.randbits(64))(settings(common, max_examples=_MANY)(given(examples)(once)))()


@contextmanager
def _alarm(name: str) -> Iterator[None]:
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise AssertionError(f"{name}: a call takes longer than {_HANGING} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(_HANGING)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# What files are made of

ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 64, 10**6, 10**9, 2**63, 10**40, -(2**70)]),
    st.sampled_from([1.5, -0.0, 1e-30, 1e39, 1e300, float("nan"), float("inf")]),
    st.sampled_from(["", "1", "none", "\0", "\ud800", "../x", "/dev/zero", "a\nb", "\x1b[2J", "(a+)+$", "x" * 300]),
    st.sampled_from([[], [1], [[]], {}, {"": 1}, {"kind": "x"}, [None], ["x"] * 300]),
    st.text(max_size=5),
    st.integers(),
)
"""A value that somebody might put in the place of another."""


@st.composite
def changed(draw: st.DrawFn, values: Mapping[str, Any], keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """The mapping with some of its values, or of `keys`, changed, taken away or hidden one level deeper."""
    found = dict(values)
    for key in draw(st.lists(st.sampled_from([*values, *keys]), min_size=1, max_size=3)):
        inner = found.get(key)
        if isinstance(inner, dict) and inner and draw(st.booleans()):
            found[key] = draw(changed(inner))
        elif draw(st.integers(0, 4)):
            found[key] = draw(ODD)
        else:
            found.pop(key, None)
    return found


@st.composite
def json_text(draw: st.DrawFn, values: Mapping[str, Any], keys: tuple[str, ...] = ()) -> bytes:
    """JSON of the changed mapping, now and then damaged as a text."""
    text = json.dumps(draw(changed(values, keys))).encode()
    return draw(damaged(text)) if not draw(st.integers(0, 3)) else text


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes cut short, with others put in, or nested."""
    place = draw(st.integers(0, len(data)))
    return draw(
        st.sampled_from(
            [
                data[:place],
                data[:place] + draw(st.binary(min_size=1, max_size=4)) + data[place:],
                data[:place] + b"[" * 2000 + data[place:],
                data[:place] + data[place + 1 :],
                b'{"a":' * 3000 + data,
                b"\xef\xbb\xbf" + data,
            ]
        )
    )

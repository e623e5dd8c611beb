"""What files of strangers are made of: values in the place of others, and bytes that are damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

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

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

TEXTS = st.one_of(
    st.sampled_from(
        ["a dog", "a dog\nin the sun", "ein Hund, groß", "犬の写真", "a {dog}", "{", "{0.__class__}", "{caption!r}"]
    ),
    st.sampled_from(
        ["", " ", "\0", "a\0b", "\ud800", "\udce9", "\x1b[2J\x1b]0;x\x07", "a\r\nerror: forged", "\u202edog"]
    ),
    st.sampled_from(["x" * 5000, "a " * 60_000, "\u0301" * 3000, "\U0001f600" * 500, "\ufeffa", "\x85", "\u2028"]),
    st.text(max_size=12),
)
"""What somebody might write in the place of a caption, a prompt or a name."""

NAMES = st.one_of(
    st.sampled_from(
        ["a.png", "", ".", "..", "/", "a/../../x", "C:\\x", "\\\\host\\x", "a\0b", "\udcff.png", "a" * 300]
    ),
    st.sampled_from(
        ["/dev/zero", "/etc/passwd", "/proc/self/environ", "~", "*", "**/*", "[a]", "a\nb", "\x1b[2J", "CON"]
    ),
    st.text(max_size=6),
)
"""What somebody might write in the place of a file's name."""


@st.composite
def in_encodings(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> bytes:
    """The bytes of a text file, in one of the encodings that people have; now and then damaged."""
    encoding = draw(
        st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp932", "utf-32"])
    )
    data = draw(texts).encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    return draw(damaged(data)) if not draw(st.integers(0, 3)) else data


def like(value: Any) -> st.SearchStrategy[Any]:
    """Other values of the same kind, near the given one; for a list, some of its elements, now and then twice."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int | float):
        return st.sampled_from([value, value + 1, value * 2, value / 2, -value, 0, 1, float(value)])
    if isinstance(value, str):
        return TEXTS | st.sampled_from([value.upper(), f" {value}", value[:-1], value * 2])
    if isinstance(value, list) and value:
        return st.lists(st.sampled_from(value), max_size=len(value) + 1)
    return st.just(value)


@st.composite
def changed(draw: st.DrawFn, values: Mapping[str, Any], keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """The mapping with up to three of its values, or of `keys`, changed, taken away or hidden one level deeper."""
    found = dict(values)
    for key in draw(st.lists(st.sampled_from([*values, *keys]), max_size=3)):
        inner = found.get(key)
        if isinstance(inner, dict) and inner and draw(st.booleans()):
            found[key] = draw(changed(inner))
        elif draw(st.integers(0, 4)):
            found[key] = draw(ODD if draw(st.booleans()) else like(found.get(key)))
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

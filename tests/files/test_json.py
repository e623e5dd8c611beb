"""One reader for JSON that other programs wrote: what it gives is plain, finite and small."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd3tune.files.json import NotJson, parse, parse_object, read_object

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc"), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_values_come_back_as_they_were_written(value: Any) -> None:
    assert parse(json.dumps(value)) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": NaN}', "a: not a finite number"),
        ('{"a": {"b": [1, -Infinity]}}', "a.b.1: not a finite number"),
        ('{"a": 1e999}', "a: not a finite number"),
        (f'{{"a": {10**30}}}', "a: not a finite number"),
        (f'{{"a": {"1" * 5000}}}', "a: not a finite number"),
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
        (r'{"a": "\ud800"}', "a: half of a surrogate pair"),
        (r'{"\udc00": 1}', "half of a surrogate pair"),
        (r'{"a": ["x\u0000y"]}', "a.0: a NUL character"),
        ("[" * 70 + "]" * 70, "nested too deeply"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("{", "Expecting property name"),
        (b"\xff\xfe{\x00}\x00", "can't decode"),
        (b'{"a": "\xff"}', "can't decode"),
        ("", "Expecting value"),
    ],
)
def test_what_other_readers_let_through_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(NotJson) as caught:
        parse(text)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_is_not_read_here_may_hold_what_other_programs_write() -> None:
    text = r'{"a": "\udce9", "b": "\u0000", "c": NaN, "d": 100000000000000000000, "e": %s}'
    found = parse(text % ("1" * 5000), plain=False)
    assert (found["a"], found["b"], found["d"], found["e"]) == ("\udce9", "\0", 10**20, math.inf)
    assert math.isnan(found["c"])
    for refused in ('{"a": 1, "a": 2}', "[" * 70 + "]" * 70):
        with pytest.raises(NotJson):
            parse(refused, plain=False)


def test_both_halves_of_a_surrogate_pair_are_a_character() -> None:
    assert parse(r'"\ud83d\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize("text", ["[]", "1", '"a"', "null", "true"])
def test_an_object_is_keys_and_values(text: str) -> None:
    with pytest.raises(NotJson, match="expected a JSON object"):
        parse_object(text)


def test_a_file_has_a_limit_and_is_a_regular_one(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"a": "x" * 100}))
    assert read_object(file) == {"a": "x" * 100}
    with pytest.raises(NotJson, match="it has 109 bytes, and at most 50 are read"):
        read_object(file, most_bytes=50)
    with pytest.raises(NotJson, match="longer than 50 bytes"):
        parse_object(file.read_bytes(), most_bytes=50)
    with pytest.raises(NotJson, match="it is a folder, not a file"):
        read_object(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "none.json")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(NotJson, match="it is a named pipe, not a file"):
            read_object(tmp_path / "pipe")

"""YAML is read as people mean it, and every problem has a line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sd3tune.config.yaml12 import YamlError, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E3", 1500.0),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("16", 16),
        ("010", 10),
        ("0x1f", 31),
        ("true", True),
        ("~", None),
        ("", None),
    ],
)
def test_scalars_of_yaml_1_2(text: str, value: object) -> None:
    read = parse(f"key: {text}").value["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["no", "on", "yes", "Off", "2024-01-01", "1:30", "1_000", "1e", "'1e-4'", '"true"'])
def test_everything_else_is_text(text: str) -> None:
    assert parse(f"key: {text}").value["key"] == text.strip("'\"")


def test_every_key_path_has_its_line() -> None:
    lines = parse("a: 1\nb:\n  - x: 1\n    y: {z: 2}\n  - 5\n").lines
    assert lines[("a",)] == 1
    assert lines[("b",)] == 2
    assert lines[("b", 0, "y")] == 4
    assert lines[("b", 0, "y", "z")] == 4
    assert lines[("b", 1)] == 5


def test_a_key_that_comes_twice_names_both_lines() -> None:
    document = parse("a:\n  b: 1\n  c: 2\n  b: 3\n")
    assert document.problems == [(("a", "b"), 4, "duplicate key; it is already on line 2")]


def test_anchors_and_merge_keys() -> None:
    document = parse("a: &one {x: 1, y: 2}\nb: *one\nc:\n  <<: *one\n  y: 3\n")
    assert document.value["b"] == {"x": 1, "y": 2}
    assert document.value["c"] == {"x": 1, "y": 3}
    assert document.problems == []
    assert document.lines[("c", "y")] == 5


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!mine x", "!!set {a}"]
)
def test_tags_are_refused(tag: str) -> None:
    document = parse(f"a: 1\nb: {tag}")
    assert document.value["b"] is None
    ((path, line, message),) = document.problems
    assert (path, line) == (("b",), 2)
    assert "not allowed" in message


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\n\tb: 2", 2, "a tab cannot"),
        ("a:\n\tb: 2", 2, "a tab cannot"),
        ("a: [1, 2\nb: 3", 2, "starts on line 1"),
        ("a: b: c", 1, "a second ': '"),
        ("a: 1\n---\nb: 2", 2, "a second document"),
        ("a:\n  b: 1\n c: 2", 3, "wrong indentation"),
        ("a: @x", 1, "put the value in quotes"),
        ("a: 1\nb: *nowhere", 2, "undefined alias 'nowhere'"),
        ("a: 1\nb: \x07", 2, "is not allowed"),
        ("a: &loop [*loop]", 1, "contains itself"),
        ("[" * 5000, 1, "nested too deeply"),
    ],
)
def test_broken_text_is_one_line_with_a_number(text: str, line: int, message: str) -> None:
    with pytest.raises(YamlError) as caught:
        parse(text)
    assert caught.value.line == line
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "node",
    [
        lambda below: "{" + ", ".join(f"k{number}: *{below}" for number in range(9)) + "}",
        lambda below: "{<<: [" + ", ".join([f"*{below}"] * 9) + "]}",  # holds nothing at all
    ],
    ids=["keys", "merges"],
)
def test_anchors_in_sections_cannot_multiply_without_end(node: Callable[[str], str]) -> None:
    text = "a0: &a0 {}\n" + "".join(f"a{level}: &a{level} {node(f'a{level - 1}')}\n" for level in range(1, 12))
    with pytest.raises(YamlError, match="anchors multiply"):
        parse(text)


def test_a_text_of_many_keys_is_refused_by_their_number() -> None:
    assert len(parse("".join(f"k{number}: 1\n" for number in range(2000))).value) == 2000
    with pytest.raises(YamlError, match="more than 40000 keys and values") as caught:
        parse("[" + "1," * 40_000 + "]\na: 1")
    assert caught.value.line == 1


def test_a_merged_key_has_the_line_of_its_anchor_and_an_own_one_its_own() -> None:
    document = parse("base: &base\n  a: {b: 1}\n  c: 2\nuse:\n  a: 3\n  <<: *base\n  d: 4\n")
    assert document.value["use"] == {"a": 3, "c": 2, "d": 4}
    assert {path: line for path, line in document.lines.items() if path[:1] == ("use",)} == {
        ("use",): 4,
        ("use", "a"): 5,
        ("use", "c"): 3,
        ("use", "d"): 7,
    }


def test_anchors_cannot_multiply_without_end() -> None:
    text = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    for level in range(1, 10):
        text += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n"
    with pytest.raises(YamlError, match="anchors multiply"):
        parse(text)


def test_a_number_too_long_to_read_is_a_problem() -> None:
    document = parse("a: !!int x\nb: " + "9" * 5000)
    assert document.problems[0][:2] == (("a",), 1)
    assert document.problems[-1][2].endswith("cannot be read as int") or document.value["b"] > 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 64\t# px", {"a": 64}),
        ("a:\t64\t", {"a": 64}),
        ("a: 1 \t \nb: 2\t\n", {"a": 1, "b": 2}),
        ("a: 'x'\t# c", {"a": "x"}),
        ("a: x\ty", {"a": "x\ty"}),
        ("a: x\t y  \t# c", {"a": "x\t y"}),
        ("a: x\t\n  y", {"a": "x y"}),
        ("a: [1,\t2\t]", {"a": [1, 2]}),
        ("a: {b: 1\t,\tc: 2}", {"a": {"b": 1, "c": 2}}),
        ("-\tx\n-\ty", ["x", "y"]),
        ("a:\t# c\n  - b: 1\t\n    c: 2\t# x\n", {"a": [{"b": 1, "c": 2}]}),
        ("a: 1\n\t# c\n \t\nb: 2", {"a": 1, "b": 2}),
        ('{\n\t"a": 1,\n\t"b": [\n\t\t1\n\t]\n}', {"a": 1, "b": [1]}),  # JSON
        ("a: &x 1\nb: *x\nc: &x 2\nd: *x", {"a": 1, "b": 1, "c": 2, "d": 2}),
        ('a: "\\ud83d\\ude00"', {"a": "\N{GRINNING FACE}"}),
    ],
)
def test_what_yaml_allows_is_read(text: str, value: object) -> None:
    document = parse(text)
    assert (document.value, document.problems) == (value, [])


@pytest.mark.parametrize(
    ("text", "line"),
    [("\ta: 1", 1), ("a:\n\tb: 1", 2), ("a:\n  b: 1\n\tc: 2", 3), ("a:\n\t- 1", 2), ("a: b\n\tc", 2)],
)
def test_a_tab_does_not_indent(text: str, line: int) -> None:
    with pytest.raises(YamlError, match="a tab cannot indent or start a value; use spaces") as caught:
        parse(text)
    assert caught.value.line == line


@pytest.mark.parametrize("text", ["-\ta: 1\n  b: 2", "-\t- a"])
def test_a_tab_does_not_indent_what_follows_a_dash(text: str) -> None:
    with pytest.raises(YamlError):
        parse(text)


def test_halves_of_surrogate_pairs_are_joined_and_a_lone_one_is_kept_for_file_names() -> None:
    assert parse('a: "\\ud83d\\ude00 \\udce9"').value == {"a": "\U0001f600 \udce9"}

"""Parser for the core schema of YAML 1.2, with a line number for every key.

PyYAML implements YAML 1.1, where `1e-4` is a string, `no` is false and the second of two equal keys silently wins.
Here `1e-4` is a float, only `true` and `false` are booleans, and a duplicate key is a problem that names both lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple["str | int", ...]

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    "null": (re.compile(r"~|null|Null|NULL|"), "~nN\0"),
    "int": (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), "-+0123456789"),
    "float": (
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        "-+.0123456789",
    ),
}
_MAX_NODES, _MAX_VALUES = 40_000, 100_000
"""Limits on keys and values in a text, and on values after its anchors are expanded."""
_TOO_DEEP = "nested too deeply"
_BREAKS = "\r\n\x85\u2028\u2029"


class YamlError(Exception):
    """Text that is not YAML, or too large for a configuration."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(frozen=True)
class Document:
    """A parsed text: plain values, the line (from 1) of every key path, and problems beyond the syntax."""

    value: Any
    lines: dict[KeyPath, int]
    problems: list[tuple[KeyPath, int, str]]
    end: int
    """Number of characters up to the end of the value; a comment may follow."""


class _Loader(yaml.SafeLoader):
    """PyYAML loader that recognises only the scalars of the YAML 1.2 core schema; all others are strings.

    Unlike PyYAML, it accepts tabs wherever YAML allows them as white space: before a comment, around and in values,
    and at the start of lines inside brackets. Tabs may not indent.
    """

    nodes = 0

    def scan_to_next_token(self) -> None:
        super().scan_to_next_token()
        while self.peek() == "\t" and (self.flow_level or not self._indents()):
            self._skip_white()
            self.allow_simple_key = self.allow_simple_key and bool(
                self.flow_level
            )  # otherwise a tab would indent `- ` or `k: `
            super().scan_to_next_token()

    def scan_plain_spaces(self, indent: int, start_mark: yaml.Mark) -> list[str] | None:
        chunks: list[str] | None = super().scan_plain_spaces(indent, start_mark)
        if self.peek() != "\t" or (not self.flow_level and self._indents()):
            return chunks
        white = self._skip_white()
        return super().scan_plain_spaces(indent, start_mark) if self.peek() in _BREAKS else [*(chunks or ()), white]

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node like PyYAML, but allow redefined anchors: an alias means the last definition before it."""
        event = self.peek_event()
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise YamlError(event.start_mark.line + 1, f"more than {_MAX_NODES} keys and values")
        if not isinstance(event, yaml.AliasEvent):
            self.anchors.pop(event.anchor, None)
        return super().compose_node(parent, index)

    def _skip_white(self) -> str:
        length = 0
        while self.peek(length) in (" ", "\t"):
            length += 1
        white: str = self.prefix(length)
        self.forward(length)
        return white

    def _indents(self) -> bool:
        """Return True if the white space here starts a line with content."""
        start, length = self.pointer, 0
        while start and self.buffer[start - 1] == " ":
            start -= 1
        while self.peek(length) in (" ", "\t"):
            length += 1
        is_start = start == 0 or self.buffer[start - 1] in _BREAKS
        return is_start and self.peek(length) not in f"#{_BREAKS}\0"


def add_scalars(cls: Any) -> None:
    """Add the scalars of YAML 1.2 to a PyYAML loader or dumper class."""
    for kind, (pattern, first) in _SCALARS.items():
        # The empty scalar is looked up under "", not under its first character.
        firsts = ["" if character == "\0" else character for character in first]
        cls.add_implicit_resolver(_TAG + kind, re.compile(rf"(?:{pattern.pattern})\Z"), firsts)


_Loader.yaml_implicit_resolvers = {}
add_scalars(_Loader)
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"<<\Z"), ["<"])


def parse(text: str) -> Document:
    """Parse one YAML document; the value of an empty text is None.

    Raises:
        YamlError: the text is not YAML, or too large.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        builder = _Builder()
        value = None if root is None else builder.build(root, ())
    except yaml.YAMLError as error:
        raise _explained(error, text) from None
    except RecursionError:
        raise YamlError(1, _TOO_DEEP) from None
    end = 0 if root is None else root.end_mark.index
    return Document(value, builder.lines, builder.problems, end)


@dataclass
class _Builder:
    """Converts PyYAML's nodes to plain values, and records their lines."""

    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[KeyPath, int, str]] = field(default_factory=list)
    values: int = 0
    open_nodes: set[int] = field(default_factory=set)

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        with self.opened(node):
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
            return self.scalar(node, path)

    @contextmanager
    def opened(self, node: yaml.Node) -> Iterator[None]:
        """Count a node, which aliases may repeat, and raise YamlError for one that contains itself."""
        self.values += 1
        line = node.start_mark.line + 1
        if self.values > _MAX_VALUES:
            raise YamlError(line, f"more than {_MAX_VALUES} values; do anchors multiply?")
        if id(node) in self.open_nodes:
            raise YamlError(line, "an anchor that contains itself")
        self.open_nodes.add(id(node))
        yield
        self.open_nodes.remove(id(node))

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, tuple[Any, dict[KeyPath, int]]] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _TAG + "merge":
                for key, value, lines in self.merge(value_node, path):
                    merged.setdefault(key, (value, lines))
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append((path, line, "a key must be a single word"))
                continue
            key = key_node.value
            here = (*path, key)
            if key in own:
                self.problems.append((here, line, f"duplicate key; it is already on line {first_line[key]}"))
                continue
            first_line[key] = line
            self.lines[here] = line
            own[key] = self.build(value_node, here)
        for key, (_, lines) in merged.items():
            if key not in own:
                self.lines.update(lines)
        return {**{key: value for key, (value, _) in merged.items()}, **own}

    def merge(self, node: yaml.Node, path: KeyPath) -> Iterator[tuple[str, Any, dict[KeyPath, int]]]:
        """Yield the keys, values and lines merged by `<<: *anchor` or `<<: [*first, *second]`; earlier anchors win."""
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode):
                line = node.start_mark.line + 1
                self.problems.append((path, line, "`<<` takes an anchor of keys and values"))
                continue
            outer, self.lines = self.lines, {}
            with self.opened(source):
                values = self.mapping(source, path)
            inner, self.lines = self.lines, outer
            lines: dict[str, dict[KeyPath, int]] = {key: {} for key in values}
            for place, line in inner.items():
                lines[str(place[len(path)])][place] = line
            yield from ((key, value, lines[key]) for key, value in values.items())

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        kind = node.tag.removeprefix(_TAG)
        line = node.start_mark.line + 1
        if kind == "str":  # JSON escapes a character beyond 16 bits as two; a lone half is a byte of a file name
            return node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        if kind not in _SCALARS or not isinstance(node, yaml.ScalarNode):
            tag = "!!" + kind if kind != node.tag else node.tag
            self.problems.append((path, line, f"the tag {tag} is not allowed; write a plain value"))
            return None
        try:
            return _converted(kind, node.value)
        except ValueError:
            self.problems.append((path, line, f"'{node.value[:40]}' cannot be read as {kind}"))
            return None


def _converted(kind: str, text: str) -> bool | int | float | None:
    if not _SCALARS[kind][0].fullmatch(text):
        raise ValueError(text)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _explained(error: yaml.YAMLError, text: str) -> YamlError:
    """Return PyYAML's error as one line."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return YamlError(line, f"the character {chr(error.character)!r} is not allowed; use an escape in double quotes")
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return YamlError(1, " ".join(str(error).split()))
    line, problem = error.problem_mark.line + 1, error.problem or "not YAML"
    if "'\\t'" in problem:
        problem = "a tab cannot indent or start a value; use spaces"
    elif "mapping values are not allowed" in problem:
        problem = "a second ': ' in one value; put the value in quotes, or check the indentation"
    elif "expected <block end>" in problem:
        problem = "wrong indentation, or a missing ':' or '-', on this line or above it"
    elif "cannot start any token" in problem:
        problem = problem.removeprefix("found ").replace("any token", "a value; put the value in quotes")
    elif "expected a single document" in (error.context or ""):
        problem = "a second document starts here ('---'); a configuration is one"
    elif error.context and error.context_mark is not None and error.context_mark.line + 1 != line:
        problem += f" ({error.context} that starts on line {error.context_mark.line + 1})"
    elif error.context:
        problem += f" ({error.context})"
    return YamlError(line, problem)

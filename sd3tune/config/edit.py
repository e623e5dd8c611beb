"""Change one value in a YAML text; comments, order and all other text stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from sd3tune.config.dump import dump_flow
from sd3tune.config.yaml12 import KeyPath, YamlError, parse
from sd3tune.errors import ConfigError

_INDENT = 2


@dataclass(frozen=True)
class Raw:
    """A value as it is to be written, such as `1e-4`; one line of YAML."""

    text: str


def with_value(text: str, path: KeyPath, value: Any) -> str:
    """Return the text with `value` at `path`, in a line of its own if the key is not there yet.

    A section that is replaced as a whole is written in braces. Raises ConfigError if the text is not YAML, or the path
    leads through a value that is no section.
    """
    try:
        before = parse(text).value
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (YamlError, yaml.YAMLError) as error:
        raise ConfigError(f"this YAML cannot be changed by the form: {error}; correct it first") from None
    written = _checked(value.text) if isinstance(value, Raw) else dump_flow(value)
    edited = _set(text, root, before, path, written)
    try:
        parse(edited)
    except YamlError as error:
        raise ConfigError(f"{_name(path)}: cannot be written there: {error}; edit the YAML itself") from None
    return edited


def _checked(text: str) -> str:
    try:
        if "\n" in text or "#" in text:
            raise ConfigError(f"{text!r}: not a value; write it in the YAML")
        parse(f"x: {text}")
    except YamlError as error:
        raise ConfigError(f"{text!r}: not a value: {error}") from None
    return text.strip() or "null"


def _set(text: str, root: yaml.Node | None, values: Any, path: KeyPath, written: str) -> str:
    """Replace the value if its key is there, else insert it into the deepest section that is."""
    node, start, depth = root, 0, 0
    for step in path:
        found = _child(node, step)
        if found is None:
            break
        start, node = found
        values, depth = values[step], depth + 1
    rest = path[depth:]
    if not rest:
        assert node is not None
        return _replaced(text, node, start, written)
    if any(isinstance(step, int) for step in rest):
        raise ConfigError(f"{_name(path)}: there is no such entry; add it in the YAML")
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return _inserted(text, node, rest, written)
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{_name(path[:depth])}: is no section; change it in the YAML")
    if node is None or depth == 0:  # an empty text
        return f"{text.rstrip()}\n{_block(rest, written, 0)}\n".lstrip("\n")
    inner = ", ".join(f"{key}: {dump_flow(one)}" for key, one in (values or {}).items())
    return _replaced(text, node, start, "{" + ", ".join(filter(None, [inner, _flow(rest, written)])) + "}")


def _child(node: yaml.Node | None, step: str | int) -> tuple[int, yaml.Node] | None:
    """Return where an entry's value begins, behind its colon, and its node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == step:
                return key.end_mark.index, value
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        value = node.value[step]
        return value.start_mark.index, value
    return None


def _replaced(text: str, node: yaml.Node, start: int, written: str) -> str:
    """Replace the text of a node, and keep the column of a comment behind it if there is room."""
    end = _end(text, node)
    in_list = start == node.start_mark.index
    colon = "" if in_list else ": "
    head, tail = text[:start], text[end:]
    if node.start_mark.line == node.end_mark.line or isinstance(node, yaml.ScalarNode):
        blank = len(tail) - len(tail.lstrip(" "))
        if tail[blank : blank + 1] == "#":
            room = len(text[start:end]) + blank - len(colon + written)
            tail = " " * max(room, 2) + tail[blank:]
    return f"{head}{colon}{written}{tail}"


def _end(text: str, node: yaml.Node) -> int:
    """Return where a node's last character ends; a block's own mark lies behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(text, last[1] if isinstance(last, tuple) else last)
    end: int = node.end_mark.index
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        return len(text[:end].rstrip("\n"))
    return end


def _inserted(text: str, node: yaml.MappingNode, rest: KeyPath, written: str) -> str:
    """Insert a line below the last entry of a block."""
    column = node.value[0][0].start_mark.column
    last_key, last = node.value[-1]
    at = max(_end(text, last), last_key.end_mark.index + 1)
    line_end = text.find("\n", at)
    at = len(text) if line_end < 0 else line_end
    apart = "\n" if column == 0 else ""  # a section of its own
    return f"{text[:at]}\n{apart}{_block(rest, written, column)}{text[at:] or chr(10)}"


def _block(rest: KeyPath, written: str, column: int) -> str:
    """Return `key: value`, with sections above it on lines of their own."""
    lines = [f"{' ' * (column + _INDENT * depth)}{key}:" for depth, key in enumerate(rest)]
    return "\n".join(lines) + f" {written}"


def _flow(rest: KeyPath, written: str) -> str:
    return f"{rest[0]}: {written}" if len(rest) == 1 else f"{rest[0]}: {{{_flow(rest[1:], written)}}}"


def _name(path: KeyPath) -> str:
    return ".".join(map(str, path))

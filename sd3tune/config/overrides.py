"""Overrides `a.b.c=value` from the command line, written into the tree of a YAML before it is checked."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from sd3tune.config.problems import dotted, shown
from sd3tune.config.shape import child, field_at, item_of, sections_of
from sd3tune.config.tree import Origin, Tree, drop_keys_of_former_kinds
from sd3tune.config.yaml12 import KeyPath, YamlError, parse


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> None:
    """Write every override into `tree`, in order; the last one of a key wins."""
    before, here = copy.deepcopy(tree.values), Path.cwd()
    for number, text in enumerate(overrides):
        origin = Origin(f"override {text if len(text) <= 200 else text[:200] + '...'}", (1, number), here)
        try:
            path, value = _split(text)
            path = _open_containers(tree, path, origin)
            tree.write(path, value, dataclasses.replace(origin, override=path))
        except _Refused as refusal:
            tree.problems.append(((), origin, str(refusal)))
    drop_keys_of_former_kinds(tree, before, is_new=lambda path: tree.origin(path).override is not None)


class _Refused(Exception):
    """Reason why an override cannot be applied."""


def _split(text: str) -> tuple[KeyPath, Any]:
    key, equals, raw = text.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(steps):
        raise _Refused("an override is key=value, such as train.steps=500")
    if steps[0] == "extends":
        raise _Refused("`extends` is for files: write it into the YAML")
    try:
        document = parse(raw)
    except YamlError as error:
        raise _Refused(error.message) from None
    if document.problems:
        path, _, message = document.problems[0]
        raise _Refused(f"{dotted(path)}: {message}" if path else message)
    if len(raw.rstrip()) > document.end:
        raise _Refused("YAML takes what follows '#' as a comment; put the value in quotes")
    return tuple(int(step) if step.isdecimal() else step for step in steps), document.value


def _open_containers(tree: Tree, path: KeyPath, origin: Origin) -> KeyPath:
    """Create missing sections above the last step of `path`, and return the path with keys of mappings as text."""
    node: Any = tree.values
    for depth, step in enumerate(path):
        here = path[:depth]
        if isinstance(node, dict):
            path = (*here, str(step), *path[depth + 1 :])
        elif not isinstance(node, list):
            raise _Refused(f"{dotted(here)} is a single value ({shown(node)}) and has no keys")
        elif not isinstance(step, int) or step >= len(node):
            raise _Refused(_no_entry(here, node, step))
        if depth == len(path) - 1:
            break
        inner = child(node, path[depth])
        if inner is None:
            inner = _absent(tree.values, path[: depth + 1])
            tree.write(path[: depth + 1], inner, origin)
        node = inner
    return path


def _absent(values: dict[str, Any], path: KeyPath) -> Any:
    """Return the container that a missing key stands for: a section, or a copy of its default list."""
    known = field_at(values, path)
    if known is None or sections_of(known.annotation):
        return {}
    if item_of(known.annotation) is not None:
        return copy.deepcopy(known.default) if isinstance(known.default, list) else []
    given = "no default" if known.default is PydanticUndefined else shown(known.default)
    raise _Refused(f"{dotted(path)} is a single value ({given}) and has no keys")


def _no_entry(path: KeyPath, entries: list[Any], step: str | int) -> str:
    if not isinstance(step, int):
        return f"{dotted(path)} is a list; name an entry by its number, such as {dotted(path)}.0"
    if not entries:
        return f"{dotted(path)} is an empty list; give it as a whole, such as {dotted(path)}='[...]'"
    numbers = "only entry 0" if len(entries) == 1 else f"entries 0 to {len(entries) - 1}"
    return f"{dotted(path)} has {numbers}; give the list as a whole to make it longer"

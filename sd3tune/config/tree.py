"""Unchecked values with the origin of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from sd3tune.config.problems import dotted, shown
from sd3tune.config.shape import kind_of, section_at, value_at
from sd3tune.config.yaml12 import KeyPath


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a line of a file, or an override."""

    label: str
    order: tuple[int, int]
    """Sort key for reported problems: (file, line); extended files come before the extending one, overrides last."""
    folder: Path
    """Folder to which paths written here are relative."""
    override: KeyPath | None = None


@dataclass
class Tree:
    """Unchecked values, with their origins and the problems found so far."""

    values: dict[str, Any]
    root: Origin
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[tuple[KeyPath, Origin, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin:
        """Return the origin of the value at `path`, else of the nearest container with an origin."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.root

    def write(self, path: KeyPath, value: Any, origin: Origin) -> None:
        """Set the value at `path`, whose container must exist, and replace its origins."""
        container: Any = self.values
        for step in path[:-1]:
            container = container[step]
        container[path[-1]] = value
        self.forget(path)
        self.origins[path] = origin

    def forget(self, path: KeyPath) -> None:
        """Remove the origins of `path` and of everything inside it."""
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]


def drop_keys_of_former_kinds(tree: Tree, before: dict[str, Any], is_new: Callable[[KeyPath], bool]) -> None:
    """Remove inherited keys of the former variant wherever a new `kind` has replaced another one.

    These are the keys that the new variant lacks or has another default for. `before` are the values before the new
    ones were written. Removed keys are listed in the tree's notes.
    """
    for path, origin in list(tree.origins.items()):
        if path[-1] != "kind" or not is_new(path):
            continue
        section = path[:-1]
        former, current = section_at(before, section), section_at(tree.values, section)
        if former is None or current is None or former is current:
            continue
        values = value_at(tree.values, section)
        for key in list(values):
            old, new = former.model_fields.get(key), current.model_fields.get(key)
            if key == "kind" or is_new((*section, key)) or old is None or (new and _default(new) == _default(old)):
                continue
            dropped = f"{dotted((*section, key))}: {shown(values.pop(key))}"
            tree.forget((*section, key))
            why = "does not have" if new is None else f"has another default for: {shown(_default(new))}"
            tree.notes.append(f"{origin.label}: dropped {dropped}, which kind {kind_of(current)} {why}")


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)

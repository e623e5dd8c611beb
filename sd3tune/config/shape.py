"""Queries on the schema: the section or field at a key path, and the variants of a section."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sd3tune.config.schema import Config
from sd3tune.config.sections.key import Key
from sd3tune.config.sections.section import Section
from sd3tune.config.yaml12 import KeyPath


def alternatives(annotation: Any) -> list[Any]:
    """Return the members of a union without `Annotated`; one member for any other annotation."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in alternatives(member)]
    return [annotation]


def sections_of(annotation: Any) -> list[type[Section]]:
    """Return the sections that a field can hold: none for a plain value, several if it has a `kind`."""
    plain = [
        kind for kind in alternatives(annotation) if get_origin(kind) is None
    ]  # Python 3.10 counts list[str] as a type
    return [kind for kind in plain if isinstance(kind, type) and issubclass(kind, Section)]


def item_of(annotation: Any) -> Any | None:
    """Return the item type of a list field; None if the field is not a list."""
    for kind in alternatives(annotation):
        if get_origin(kind) is list:
            return get_args(kind)[0]
    return None


def entry_field(item: Any) -> FieldInfo:
    """Return a list entry as a field."""
    return FieldInfo(annotation=item)


def kind_of(section: type[Section]) -> str | None:
    """Return the value of `kind` that selects this section; None for a section without variants."""
    field = section.model_fields.get("kind")
    return None if field is None else field.default


def default_section(field: FieldInfo) -> type[Section] | None:
    """Return the variant of a field without `kind`: its default, else the first; None for a plain value."""
    sections = sections_of(field.annotation)
    if field.default_factory in sections:
        return field.default_factory
    return sections[0] if sections else None


def variant(field: FieldInfo, value: Any) -> type[Section] | None:
    """Return the section that `value` selects in `field`: the default without `kind`, None for a wrong `kind`."""
    sections = sections_of(field.annotation)
    if len(sections) > 1 and isinstance(value, dict) and "kind" in value:
        return next((section for section in sections if kind_of(section) == value["kind"]), None)
    return default_section(field)


def field_at(tree: Any, path: KeyPath, root: type[Section] = Config) -> FieldInfo | None:
    """Return the field of `root` at a key path, in the variants that `tree` selects; None if there is no such key."""
    field = FieldInfo(annotation=root)
    value = tree
    for step in path:
        if isinstance(step, int):
            item = item_of(field.annotation)
            if item is None:
                return None
            field = entry_field(item)
        else:
            section = variant(field, value)
            inner = None if section is None else section.model_fields.get(step)
            if inner is None:
                return None
            field = inner
        value = child(value, step)
    return field


def section_at(tree: Any, path: KeyPath, root: type[Section] = Config) -> type[Section] | None:
    """Return the section at a key path that `tree` selects; None for a plain value or no such key."""
    field = field_at(tree, path, root)
    return None if field is None else variant(field, value_at(tree, path))


def value_at(tree: Any, path: KeyPath) -> Any:
    """Return the value written at a key path, or None."""
    for step in path:
        tree = child(tree, step)
    return tree


def child(value: Any, step: str | int) -> Any:
    """Return `value[step]`, or None if it does not exist."""
    if isinstance(value, dict):
        return value.get(step)
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        return value[step]
    return None


def all_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key of the schema with its field, sections before their keys, in the schema's order."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        item = item_of(field.annotation)
        for inner in sections_of(item if item is not None else field.annotation):
            yield from all_fields(inner, f"{prefix}{name}." if item is None else f"{prefix}{name}[].")


def paths_in(
    section: type[Section], value: Any, prefix: KeyPath = ()
) -> Iterator[tuple[KeyPath, Callable[[str, Path], bool]]]:
    """Yield the key path of each text that may be a path in unchecked values, with the test for paths."""
    for name, field in section.model_fields.items() if isinstance(value, dict) else ():
        key, inner, path = key_of(field), value.get(name), (*prefix, name)
        if key is not None and key.path is not None and isinstance(inner, str):
            yield path, key.path
        if key is not None and key.path is not None and isinstance(inner, dict):
            yield from (((*path, entry), key.path) for entry, text in inner.items() if isinstance(text, str))
        item = item_of(field.annotation)
        entries = enumerate(inner) if item is not None and isinstance(inner, list) else [(None, inner)]
        for number, entry in entries:
            chosen = variant(field if number is None else entry_field(item), entry)
            if chosen is not None:
                yield from paths_in(chosen, entry, path if number is None else (*path, number))


def key_of(field: FieldInfo) -> Key | None:
    """Return the `Key` declared on a field; None without one."""
    return next((item for item in field.metadata if isinstance(item, Key)), None)


def fill_kinds(section: type[Section], value: dict[str, Any]) -> None:
    """Write the default `kind` into every section of `value` that has variants and no `kind`."""
    for name, field in section.model_fields.items():
        inner = value.get(name)
        item = item_of(field.annotation)
        if item is not None and isinstance(inner, list):
            for entry in inner:
                _fill_one(entry_field(item), entry)
        else:
            _fill_one(field, inner)


def _fill_one(field: FieldInfo, value: Any) -> None:
    if not isinstance(value, dict):
        return
    section = variant(field, value)
    if section is None:
        return
    if len(sections_of(field.annotation)) > 1:
        value.setdefault("kind", kind_of(section))
    fill_kinds(section, value)

"""Questions about the schema's shape: which section lies at a key path, which variants it has."""

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
    """The members of a union, `Annotated` taken off; one member for anything else."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in alternatives(member)]
    return [annotation]


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field can hold: none for a plain value, several for one with a `kind`."""
    plain = [kind for kind in alternatives(annotation) if get_origin(kind) is None]  # 3.10 takes list[str] for a type
    return [kind for kind in plain if isinstance(kind, type) and issubclass(kind, Section)]


def item_of(annotation: Any) -> Any | None:
    """What a list field holds; None when the field is no list."""
    for kind in alternatives(annotation):
        if get_origin(kind) is list:
            return get_args(kind)[0]
    return None


def entry_field(item: Any) -> FieldInfo:
    """The field that an entry of a list is."""
    return FieldInfo(annotation=item)


def kind_of(section: type[Section]) -> str | None:
    """The value of `kind` that selects this section; None for a section without variants."""
    field = section.model_fields.get("kind")
    return None if field is None else field.default


def default_section(field: FieldInfo) -> type[Section] | None:
    """The variant a field has when no kind is written: its default or else the first."""
    sections = sections_of(field.annotation)
    if field.default_factory in sections:
        return field.default_factory
    return sections[0] if sections else None


def variant(field: FieldInfo, value: Any) -> type[Section] | None:
    """The section that `value` selects in `field`; the default without a kind, None for a wrong one."""
    sections = sections_of(field.annotation)
    if len(sections) > 1 and isinstance(value, dict) and "kind" in value:
        return next((section for section in sections if kind_of(section) == value["kind"]), None)
    return default_section(field)


def field_at(tree: Any, path: KeyPath) -> FieldInfo | None:
    """The schema's field for a key path, following the variants that `tree` selects; None for no key."""
    field = FieldInfo(annotation=Config)
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


def section_at(tree: Any, path: KeyPath) -> type[Section] | None:
    """The section at a key path, as `tree` selects it; None when a plain value, or nothing, is there."""
    field = field_at(tree, path)
    return None if field is None else variant(field, value_at(tree, path))


def value_at(tree: Any, path: KeyPath) -> Any:
    """What was written at a key path, or None."""
    for step in path:
        tree = child(tree, step)
    return tree


def child(value: Any, step: str | int) -> Any:
    """`value[step]`, or None where there is nothing."""
    if isinstance(value, dict):
        return value.get(step)
    if isinstance(value, list) and isinstance(step, int) and step < len(value):
        return value[step]
    return None


def all_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of the schema with its field, sections before their keys, in the schema's order."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        item = item_of(field.annotation)
        for inner in sections_of(item if item is not None else field.annotation):
            yield from all_fields(inner, f"{prefix}{name}." if item is None else f"{prefix}{name}[].")


def paths_in(
    section: type[Section], value: Any, prefix: KeyPath = ()
) -> Iterator[tuple[KeyPath, Callable[[str, Path], bool]]]:
    """Where unchecked values hold a text that may be a path, and the test that tells whether it is one."""
    for name, field in section.model_fields.items() if isinstance(value, dict) else ():
        key, inner, path = key_of(field), value.get(name), (*prefix, name)
        if key is not None and key.path is not None and isinstance(inner, str):
            yield path, key.path
        item = item_of(field.annotation)
        entries = enumerate(inner) if item is not None and isinstance(inner, list) else [(None, inner)]
        for number, entry in entries:
            chosen = variant(field if number is None else entry_field(item), entry)
            if chosen is not None:
                yield from paths_in(chosen, entry, path if number is None else (*path, number))


def key_of(field: FieldInfo) -> Key | None:
    """Return what a field declares of itself; None for one that declares nothing."""
    return next((item for item in field.metadata if isinstance(item, Key)), None)


def fill_kinds(section: type[Section], value: dict[str, Any]) -> None:
    """Write the default `kind` into every section of `value` that has variants and names none."""
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

"""The JSON Schema of a configuration file, for editors; `make docs` writes it to configs/schema.json."""

from __future__ import annotations

from typing import Any

from sd3tune.config.schema import Config
from sd3tune.config.sections.section import Section
from sd3tune.config.shape import item_of, sections_of

_FILE = {"type": "string", "minLength": 1}
_EXTENDS = {
    "description": "One or more files to extend, relative to this file, or `preset:` and the name of a shipped preset. "
    "Later files override earlier ones, and this file overrides all.",
    "anyOf": [_FILE, {"type": "array", "items": _FILE, "minItems": 1}],
    "title": "Extends",
}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a file: a whole configuration, or one that `extends` another."""
    schema = _without_discriminators(Config.model_json_schema())
    complete = _complete(Config)
    for section in _completed_by_extending(Config):
        definition = schema if section is Config else schema["$defs"][section.__name__]
        definition.pop("required", None)
    properties = {"extends": _EXTENDS, **schema.pop("properties")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": properties,
        "anyOf": [{"required": ["extends"]}, complete],
    }


def _complete(section: type[Section]) -> dict[str, Any]:
    """Return the required keys of a file that extends nothing, in the sections that are merged key by key."""
    names = [name for name, field in section.model_fields.items() if field.is_required()]
    inside = {name: _complete(inner) for name, inner in _merged(section)}
    needed = {"required": names, "properties": {name: schema for name, schema in inside.items() if schema}}
    return {key: value for key, value in needed.items() if value}


def _completed_by_extending(section: type[Section]) -> list[type[Section]]:
    return [section, *(found for _, inner in _merged(section) for found in _completed_by_extending(inner))]


def _merged(section: type[Section]) -> list[tuple[str, type[Section]]]:
    """Return the inner sections that are merged key by key: no list entries, and no sections with a `kind`."""
    found = []
    for name, field in section.model_fields.items():
        inner = sections_of(field.annotation)
        if len(inner) == 1 and item_of(field.annotation) is None:
            found.append((name, inner[0]))
    return found


def _without_discriminators(node: Any) -> Any:
    """Replace pydantic's oneOf by anyOf: a section without `kind` can match several variants."""
    if isinstance(node, dict):
        renamed = {"anyOf" if key == "oneOf" else key: inner for key, inner in node.items() if key != "discriminator"}
        return {key: _without_discriminators(inner) for key, inner in renamed.items()}
    return [_without_discriminators(inner) for inner in node] if isinstance(node, list) else node

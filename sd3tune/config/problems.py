"""pydantic's errors as readable messages: the given value, the allowed ones, and a fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic_core import ErrorDetails

from sd3tune.config.schema import Config
from sd3tune.config.sections.section import Section
from sd3tune.config.shape import all_fields, child, field_at, kind_of, section_at, sections_of
from sd3tune.config.yaml12 import KeyPath

_NOUNS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
}
_SECTION_TYPES = ("model_type", "model_attributes_type", "dict_type")
_BOUNDS = {
    "greater_than_equal": ("ge", "is too small; at least"),
    "greater_than": ("gt", "is too small; must be above"),
    "less_than_equal": ("le", "is too large; at most"),
    "less_than": ("lt", "is too large; must be below"),
}


def dotted(path: KeyPath) -> str:
    """Return a key path as in overrides: `data.sources.0.path`."""
    return ".".join(str(step) for step in path)


def shown(value: Any) -> str:
    """Return a value as in YAML, shortened to 60 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except ValueError:  # an integer beyond Python's limit of printable digits
        return "a huge integer"
    return text if len(text) <= 60 else text[:57] + "..."


def explain(errors: list[ErrorDetails], tree: Any, root: type[Section] = Config) -> Iterator[tuple[KeyPath, str]]:
    """Yield one (key path, message) per problem in values of `root`; all alternatives of a union give one message."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        by_path.setdefault(_key_path(error, tree), []).append(error)
    around = {path[:length] for path in by_path for length in range(len(path))}
    for path, found in by_path.items():
        if path in around and all(_is_mismatch(error) for error in found):
            continue  # another alternative of the same union got further
        yield path, _message(path, found, tree, root)


def _key_path(error: ErrorDetails, tree: Any) -> KeyPath:
    """Return the error's location without the labels that pydantic adds for alternatives of a union."""
    path: list[str | int] = []
    value, label = tree, None
    for step in error["loc"]:
        if label is not None and step == label:
            label = None
            continue
        known = step in value if isinstance(value, dict) else isinstance(step, int) and isinstance(value, list)
        if known:
            path.append(step)
            value = child(value, step)
            label = value.get("kind") if isinstance(value, dict) else None
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    if error["type"].startswith("union_tag"):
        path.append("kind")
    return tuple(path)


def _is_mismatch(error: ErrorDetails) -> bool:
    """Return True if the value has the wrong type, rather than being out of range."""
    return error["type"] == "literal_error" or error["type"] in _NOUNS or error["type"] in _SECTION_TYPES


def _message(path: KeyPath, errors: list[ErrorDetails], tree: Any, root: type[Section]) -> str:
    closest = [error for error in errors if not _is_mismatch(error)]
    if len(errors) > 1 and not closest:
        nouns = " nor ".join(_noun(error) for error in errors)
        return f"{shown(errors[0]['input'])} is neither {nouns}"
    return _single(path, (closest or errors)[0], tree, root)


def _noun(error: ErrorDetails) -> str:
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"])
    return _NOUNS.get(error["type"], "a section of keys")


def _single(path: KeyPath, error: ErrorDetails, tree: Any, root: type[Section]) -> str:
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, tree, root)
    if kind == "missing":
        return f"missing{_example(path, tree, root)}"
    if kind in _NOUNS:
        return f"{shown(given)} is not {_NOUNS[kind]}{_remedy(kind, given)}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{shown(given)} {words} {_plain(context[name])}"
    if kind in _SECTION_TYPES and given is None:
        return f"is empty; leave it out or give it keys: {_keys(path, tree, root)}"
    if kind in _SECTION_TYPES:
        return f"{shown(given)} is not a section; its keys are {_keys(path, tree, root)}"
    if kind == "literal_error":
        return f"{shown(given)} is not one of: {context['expected'].replace(chr(39), '').replace(' or ', ', ')}"
    if kind == "union_tag_invalid":
        return f"{shown(child(given, 'kind'))} is not one of: {context['expected_tags'].replace(chr(39), '')}"
    if kind in ("too_short", "too_long"):
        bound, words = ("min_length", "at least") if kind == "too_short" else ("max_length", "at most")
        count = context["actual_length"]
        entries = "1 entry" if count == 1 else f"{count} entries"
        return f"{shown(given)} has {entries}; {words} {context[bound]}{_example(path, tree, root)}"
    if kind == "string_too_short":
        return f"is empty{_example(path, tree, root)}"
    if kind == "string_unicode":  # of pydantic, for text with a bound; such names come from folders alone
        return f"{shown(given)} is not UTF-8; rename the folder"
    if kind == "finite_number":
        return f"{shown(given)} is not a finite number"
    if kind == "value_error":
        words = error["msg"].removeprefix("Value error, ")
        return words if isinstance(given, dict) else f"{shown(given)} {words}"
    return f"{shown(given)}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _plain(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else f"{bound:g}"


def _remedy(kind: str, given: Any) -> str:
    if kind == "string_type" and isinstance(given, int | float):
        return "; put it in quotes"
    if kind == "string_type" and isinstance(given, dict):
        return "; if it is one text with a colon, put it in quotes"
    if kind == "list_type" and isinstance(given, str | int | float):
        return f"; write [{shown(given)}]"
    if kind in ("int_type", "float_type") and isinstance(given, str) and given.replace(".", "", 1).isdigit():
        return "; remove the quotes"
    if kind in ("int_type", "int_from_float") and isinstance(given, float) and given.is_integer():
        return f"; write {given:.0f}"
    return ""


def _example(path: KeyPath, tree: Any, root: type[Section]) -> str:
    field = field_at(tree, path, root)
    if field is None or not field.examples:
        return ""
    return f"; for example `{path[-1]}: {field.examples[0]}`"


def _keys(path: KeyPath, tree: Any, root: type[Section]) -> str:
    section = section_at(tree, path, root)
    return ", ".join(section.model_fields) if section is not None else "unknown"


def _unknown_key(path: KeyPath, tree: Any, root: type[Section]) -> str:
    """Return `unknown key`, with the most likely intended key."""
    key, section = str(path[-1]), section_at(tree, path[:-1], root)
    siblings = list(section.model_fields) if section is not None else []
    if root is Config and len(path) == 1 and difflib.get_close_matches(key, ["extends"], cutoff=0.8):
        return "unknown key; did you mean 'extends'?"
    parent = field_at(tree, path[:-1], root)
    for other in sections_of(parent.annotation) if parent is not None else []:
        if key in other.model_fields:
            ours = "this kind" if section is None else f"kind {kind_of(section)}"
            return f"unknown key with {ours}; it belongs to kind {kind_of(other)}"
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    elsewhere = [name for name, _ in all_fields(root) if name.rpartition(".")[2] == key]
    if elsewhere:
        return f"unknown key; did you mean {min(elsewhere, key=lambda name: name.count('.'))!r}?"
    return f"unknown key; the keys here are {', '.join(siblings)}"

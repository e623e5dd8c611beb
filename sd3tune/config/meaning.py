"""Selections of a configuration's keys by their declared meaning; see `sections.key`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sd3tune.config.sections.key import WRITTEN, Identity, Key, Knob, Phase
from sd3tune.config.sections.section import Section
from sd3tune.config.shape import key_of


def identity_of(section: Section, resolved: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the keys of a section that must be equal when a run is resumed, in order, with nested sections.

    `resolved` maps dotted keys that are compared by a derived value to their derived entries; missing ones are left
    out.
    """
    return _selected(section, lambda key: key.identity is Identity.WRITTEN, resolved)


def compared_when_finished(section: Section) -> dict[str, Any]:
    """Return the written values of keys that an unfinished run compares through its encoded data."""
    return _selected(section, lambda key: key.identity is Identity.ENCODED)


def settings_of(section: Section, phase: Phase) -> dict[str, Any]:
    """Return the keys that may affect the forecast of a phase."""
    return _selected(section, lambda key: phase in key.phases)


def contract_of(section: Section) -> dict[str, Any]:
    """Return a section's keys that the contract states as written: name in the contract -> value.

    A method's keys are left to the method.
    """
    stated: dict[str, Any] = {}
    values = section.model_dump()
    for name, field in type(section).model_fields.items():
        key, inner = key_of(field), getattr(section, name)
        if key is not None and key.contract:
            stated[name if key.contract is True else key.contract] = values[name]
        elif isinstance(inner, Section) and name != "method":
            stated |= contract_of(inner)
    return stated


def keys_of_ranks(section: type[Section]) -> list[str]:
    """Return the keys of a method's section that an adapter with other ranks no longer has."""
    keys = {name: key_of(field) for name, field in section.model_fields.items()}
    return [name for name, key in keys.items() if key is not None and key.of_ranks]


def knobs_of(section: Section, prefix: str = "") -> Iterator[tuple[str, Knob]]:
    """Yield each dotted key of the section that can reduce memory, with its `Knob`."""
    for name, field in type(section).model_fields.items():
        key, inner = key_of(field), getattr(section, name)
        if key is not None and key.knob is not None:
            yield prefix + name, key.knob
        if isinstance(inner, Section):
            yield from knobs_of(inner, f"{prefix}{name}.")


def leaner_values(section: Section, path: str) -> tuple[Any, ...]:
    """Return the values of a dotted key that take less memory; empty if the key is missing or no knob."""
    return next((knob.leaner for name, knob in knobs_of(section) if name == path), ())


def _selected(
    section: Section,
    wanted: Callable[[Key], bool],
    resolved: Mapping[str, Mapping[str, Any]] = {},
    prefix: str = "",
) -> dict[str, Any]:
    """Return the selected keys of a section and its inner sections; sections without any are left out.

    Undeclared keys, which a section from outside the package may have, count as `WRITTEN`.
    """
    found: dict[str, Any] = {}
    values = section.model_dump()
    for name, field in type(section).model_fields.items():
        inner, path = getattr(section, name), prefix + name
        if path in resolved:
            found |= resolved[path]
        elif isinstance(inner, Section):
            inside = _selected(inner, wanted, resolved, f"{path}.")
            found |= {name: inside} if inside else {}
        elif isinstance(inner, list) and any(isinstance(entry, Section) for entry in inner):
            is_wanted = wanted(key_of(field) or WRITTEN)
            entries = [
                _selected(entry, wanted) if isinstance(entry, Section) else is_wanted and entry for entry in inner
            ]
            found |= {name: entries} if any(entries) else {}
        elif wanted(key := key_of(field) or WRITTEN) and not (key.added and inner == field.default):
            found[name] = values[name]
    return found

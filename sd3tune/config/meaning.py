"""Selections of a configuration's keys by what they mean; see `sections.key`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sd3tune.config.sections.key import WRITTEN, Identity, Key, Knob, Phase
from sd3tune.config.sections.section import Section
from sd3tune.config.shape import key_of


def identity_of(section: Section, resolved: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what of a section has to be the same when a run is resumed, in the section's order, sections nested.

    `resolved` gives, by dotted key, the entries that stand for the keys compared by what follows from them; one that
    it lacks is left out.
    """
    return _selected(section, lambda key: key.identity is Identity.WRITTEN, resolved)


def compared_when_finished(section: Section) -> dict[str, Any]:
    """Return the keys that an unfinished run compares by its encoded data, as they are written."""
    return _selected(section, lambda key: key.identity is Identity.ENCODED)


def settings_of(section: Section, phase: Phase) -> dict[str, Any]:
    """Return the keys on which the forecast of a phase may depend."""
    return _selected(section, lambda key: phase in key.phases)


def contract_of(section: Section) -> dict[str, Any]:
    """Return what the contract states of a section's keys as they are written: its name there -> value.

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


def knobs_of(section: Section, prefix: str = "") -> Iterator[tuple[str, Knob]]:
    """Every dotted key of the section that is advised when memory is short."""
    for name, field in type(section).model_fields.items():
        key, inner = key_of(field), getattr(section, name)
        if key is not None and key.knob is not None:
            yield prefix + name, key.knob
        if isinstance(inner, Section):
            yield from knobs_of(inner, f"{prefix}{name}.")


def leaner_values(section: Section, path: str) -> tuple[Any, ...]:
    """Return the values of a dotted key that take less memory; none where the key is not there or no knob."""
    return next((knob.leaner for name, knob in knobs_of(section) if name == path), ())


def _selected(
    section: Section,
    wanted: Callable[[Key], bool],
    resolved: Mapping[str, Mapping[str, Any]] = {},
    prefix: str = "",
) -> dict[str, Any]:
    """Return the wanted keys of a section and of those inside; sections without any are left out.

    A key that declares nothing, which a section from outside may have, counts as one that is compared as written.
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
            entries = [_selected(entry, wanted) for entry in inner]
            found |= {name: entries} if any(entries) else {}
        elif wanted(key_of(field) or WRITTEN):
            found[name] = values[name]
    return found

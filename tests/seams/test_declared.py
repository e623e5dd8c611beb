"""What the seams rest on: every key says what it means, and nobody asks a method or a section for its class."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import torch

import sd3tune
from sd3tune.config.meaning import compared_when_finished, knobs_of
from sd3tune.config.sections.key import Knob
from sd3tune.config.sections.section import Section
from sd3tune.config.shape import all_fields, alternatives, item_of, key_of, sections_of
from sd3tune.forecast.forecast import forecast_inputs
from sd3tune.forecast.knobs import knobs
from sd3tune.methods import METHODS, LoraMethod
from sd3tune.run.knobs import encoding_knob, loading_knob, training_knob

PACKAGE = Path(sd3tune.__file__).parent


def test_every_key_declares_what_it_means() -> None:
    """But for those that hold sections only, whose keys do."""
    silent = []
    for name, field in all_fields():
        item = item_of(field.annotation)
        held = field.annotation if item is None else item
        if key_of(field) is None and len(sections_of(held)) < len(alternatives(held)):
            silent.append(name)
    assert not silent


def test_a_finished_run_compares_by_their_values_what_others_compare_by_their_data(quick_config, tmp_path) -> None:
    found = compared_when_finished(quick_config(tmp_path, "data.flip=true"))
    assert found == {"data": {"trigger": None, "buckets": True, "crop_variants": 1, "flip": True}}


def test_the_keys_that_are_advised_when_memory_is_short_are_those_that_say_so(quick_config, tmp_path: Path) -> None:
    advised: set[str] = set()
    known: dict[str, Knob] = {}
    variants = (
        "model.t5_quantize=int8", "model.t5_device=cpu", "model.dtype=fp32", "train.batch_size=2", "data.flip=false",
        "train.gradient_checkpointing=selective", "train.gradient_checkpointing=block model.quantize=nf4",
        "train.gradient_checkpointing=block train.checkpointed_blocks=1",
    )  # fmt: skip
    for settings in variants:
        config = quick_config(tmp_path, "data.resolution=1024", *settings.split())
        known |= dict(knobs_of(config))
        out_of_memory = {
            "encode": encoding_knob(config),
            "load": loading_knob(config, 4),
            "train": training_knob(config, LoraMethod(config), 4),
        }
        for phase, text in out_of_memory.items():
            assert all(phase in known[name].eases for name in _named(text))
            advised |= _named(text)
        advised |= _named(" ".join(typed for typed, _ in knobs(forecast_inputs(config, torch.float32))))
    advised.discard("method.targets")  # the method's own saving
    assert advised == known.keys()


def _named(text: str) -> set[str]:
    """The keys that a text says to set."""
    return set(re.findall(r"([a-z0-9_.]+)=", text))


def test_no_class_of_a_method_or_a_section_is_asked_for_outside_the_configuration() -> None:
    """What differs between kinds is theirs to say. Inside the configuration, code deals with any section."""
    kinds = {"Method", *(method.__name__ for method in METHODS.values()), *map(_name, _below(Section))}
    asked = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] != "config"
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and _name(call.func) in ("isinstance", "issubclass") and len(call.args) == 2
        if kinds & {_name(node) for node in ast.walk(call.args[1])}
    ]
    assert not asked


def _below(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for inner in section.__subclasses__():
        yield from _below(inner)


def _name(node: object) -> str:
    return next((str(of) for of in (getattr(node, name, None) for name in ("id", "attr", "__name__")) if of), "")

"""The committed JSON Schema is current, valid, and accepts what the loader accepts of a file's shape."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sd3tune.config import json_schema
from sd3tune.config.presets import SCHEMA_FILE
from sd3tune.config.yaml12 import parse

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


def test_the_committed_schema_is_current() -> None:
    written = json.loads((CONFIGS / SCHEMA_FILE).read_text(encoding="utf-8"))
    assert written == json_schema(), "configs/schema.json is out of date: run `make docs`"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_refers_to_it_and_satisfies_it(path: Path, validator: Any) -> None:
    text = path.read_text(encoding="utf-8")
    (reference,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, flags=re.MULTILINE)
    assert (path.parent / reference).samefile(CONFIGS / SCHEMA_FILE)
    assert list(validator.iter_errors(parse(text).value)) == []


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("data: {sources: [{path: a}]}", True),
        ("data: {sources: [{path: a}]}\nflow: {weighting: {gamma: 2.0}}", True),
        ("extends: a.yaml", True),
        ("extends: [a.yaml, preset:b]\ndata: {resolution: 512}", True),
        ("data: {resolution: 512}", False),
        ("name: x", False),
        ("extends: []\ndata: {sources: [{path: a}]}", False),
        ("extends: a.yaml\ndata: {sources: [{caption: a}]}", False),
        ("extends: a.yaml\ntrain: {stesp: 1}", False),
        ("data: {sources: [{path: a}]}\ntrain: {steps: many}", False),
    ],
)
def test_a_file_is_complete_or_extends_another(text: str, valid: bool, validator: Any) -> None:
    assert validator.is_valid(parse(text).value) is valid

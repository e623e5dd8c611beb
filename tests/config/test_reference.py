"""What is written about the schema agrees with it."""

from __future__ import annotations

from pathlib import Path

from sd3tune.config import json_schema
from sd3tune.config.reference import reference
from sd3tune.config.schema import Config
from sd3tune.config.sections.flow import LogitNormalConfig
from sd3tune.config.shape import all_fields

ROOT = Path(__file__).parents[2]


def test_the_config_reference_is_current() -> None:
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == reference(), "docs/config.md is out of date: run `make docs`"


def test_every_key_is_in_the_reference_with_its_meaning() -> None:
    page = reference().replace("\\|", "|")
    for name, field in all_fields():
        assert field.description, f"{name} has no description"
        assert field.description in page, name


def test_every_description_is_a_sentence() -> None:
    for name, field in all_fields():
        assert (field.description or "").endswith("."), f"{name}: a sentence ends with a full stop"


def test_the_json_schema_knows_every_section_and_refuses_other_keys() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {"extends", *Config.model_fields}
    assert schema["anyOf"][0] == {"required": ["extends"]}
    assert schema["anyOf"][1]["required"] == ["data"]
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert all(one["additionalProperties"] is False for one in schema["$defs"].values())
    assert schema["properties"]["seed"]["minimum"] == 0


def test_the_json_schema_lets_kind_be_left_out_as_the_loader_does() -> None:
    schema = json_schema()
    assert "anyOf" in schema["$defs"]["FlowConfig"]["properties"]["timesteps"]
    assert "oneOf" not in repr(schema)
    assert "required" not in schema["$defs"][LogitNormalConfig.__name__]

"""What other programs show of an adapter: the keys of each form, and no claim that is not certain."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sd3tune.adapter.file import find_adapter, read_adapter
from sd3tune.adapter.modelspec import ARCHITECTURES, describe_tags, shown_metadata, tag_frequency
from sd3tune.commands.lora_convert import convert_lora
from sd3tune.commands.lora_inspect import inspect_lora
from sd3tune.commands.train import run_training
from sd3tune.model.base.parts import CONFIGS, VARIANTS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.base.single_file_header import released_shape
from sd3tune.model.base.weights import read_json

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
CONTRACT: dict[str, Any] = {
    "contract_version": 1, "name": "rex", "base": MEDIUM, "base_kind": "hub", "base_released_as": MEDIUM,
    "trigger": "sks", "instance_prompt": "a photo of sks dog", "resolution": 768, "max_sequence_length": 77,
    "encoders": ["clip_l", "clip_g", "t5"], "sampling_steps": 28, "guidance": 4.5, "tag_frequency": {"sks": 2},
}  # fmt: skip
SHOWN = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "stable-diffusion-3-3-5-medium/lora",
    "modelspec.title": "rex",
    "modelspec.resolution": "768x768",
    "modelspec.trigger_phrase": "sks",
    "modelspec.usage_hint": "28 steps, guidance 4.5, 77 T5 tokens",
    "trained_words": "sks",
    "ss_base_model_version": "sd3.5",
    "ss_tag_frequency": '{"rex": {"sks": 2}}',
}
OWN = {
    "diffusers": {"modelspec.implementation": "diffusers"},
    "kohya": {"modelspec.implementation": "diffusers", "ss_network_module": "networks.lora_sd3", "ss_network_dim": "1",
              "ss_network_alpha": "1"},
    "comfyui": {"modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI"},
}  # fmt: skip


def file_of(folder: Path, module: str, width: int, **metadata: str) -> Path:
    tensors = {f"transformer.{module}.lora_A.weight": torch.ones(1, width),
               f"transformer.{module}.lora_B.weight": torch.ones(width, 1)}  # fmt: skip
    save_file(tensors, folder / "a.safetensors", metadata or None)
    return folder / "a.safetensors"


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("form", OWN)
def test_every_form_has_the_keys_that_uis_read_there_and_back(form: str, tmp_path: Path) -> None:
    file = file_of(tmp_path, "transformer_blocks.3.attn.to_q", 1536, sd3tune=json.dumps(CONTRACT))
    convert_lora(file, form, tmp_path / "b.safetensors")
    expected = {**SHOWN, **OWN[form], "ss_output_name": "b", "format": "pt"}
    found = metadata_of(tmp_path / "b.safetensors")
    assert json.loads(found.pop("sd3tune")) == CONTRACT
    found.pop("lora_adapter_metadata", None)
    assert found == expected
    convert_lora(tmp_path / "b.safetensors", "diffusers", tmp_path / "c.safetensors")
    back = metadata_of(tmp_path / "c.safetensors")
    assert {key: back[key] for key in SHOWN} == SHOWN
    assert not any(key.startswith("ss_network") for key in back)


def test_a_foreign_file_keeps_what_it_says_of_itself(tmp_path: Path) -> None:
    theirs = {"modelspec.title": "Rex v2", "modelspec.author": "me", "modelspec.thumbnail": "data:image/png;base64,AA",
              "modelspec.architecture": "stable-diffusion-v3.5-large/lora", "ss_tag_frequency": "{}"}  # fmt: skip
    stale = {"modelspec.hash_sha256": "0x12", "sshs_legacy_hash": "12", "ss_network_dim": "8"}
    file = file_of(tmp_path, "transformer_blocks.3.attn.to_q", 1536, **theirs, **stale)
    convert_lora(file, "diffusers", tmp_path / "b.safetensors")
    found = metadata_of(tmp_path / "b.safetensors")
    assert {key: found[key] for key in theirs} == theirs  # SD3 and SD3.5 medium fit, so its own word counts
    assert not stale.keys() & found.keys()


@pytest.mark.parametrize(
    ("module", "width", "contract", "architecture"),
    [
        ("transformer_blocks.30.attn.to_q", 2432, None, ARCHITECTURES["sd35-large"]),
        ("transformer_blocks.3.attn2.to_q", 1536, None, ARCHITECTURES["sd35-medium"]),
        ("transformer_blocks.3.attn.to_q", 1536, None, None),  # one of two
        ("transformer_blocks.3.attn.to_q", 1536, {"base": MEDIUM}, ARCHITECTURES["sd35-medium"]),
        ("transformer_blocks.3.attn.to_q", 1536, {"base": "x", "base_released_as": MEDIUM},
         ARCHITECTURES["sd35-medium"]),
        ("transformer_blocks.3.attn2.to_q", 1536, {"base": "x", "base_released_as": None}, None),  # another shape
        ("transformer_blocks.3.attn.to_q", 256, {"base": "nano"}, None),
    ],
)  # fmt: skip
def test_an_architecture_is_stated_only_where_it_is_certain(
    module: str, width: int, contract: dict | None, architecture: str | None, tmp_path: Path
) -> None:
    file = file_of(tmp_path, module, width, **({"sd3tune": json.dumps(contract)} if contract else {}))
    convert_lora(file, "comfyui", tmp_path / "b.safetensors")
    found = metadata_of(tmp_path / "b.safetensors")
    assert found.get("modelspec.architecture") == architecture
    assert ("ss_base_model_version" in found) == (width > 256)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_released_shape_is_known_by_its_config(variant: str) -> None:
    config = read_json(CONFIGS / variant / "transformer" / "config.json")
    older = {key: value for key, value in config.items() if value}  # files of 2024 lack what is none
    assert released_shape(config) == released_shape({**older, "sample_size": 64, "_diffusers_version": "0"}) == variant
    assert released_shape({**config, "dual_attention_layers": tuple(config["dual_attention_layers"])}) == variant
    assert released_shape({**config, "num_layers": 23}) is None
    assert released_shape({**config, "dual_attention_layers": [5]}) is None


@pytest.mark.parametrize("base", ["tiny", "tiny-sd3", "tiny-sd35-large", "nano"])
def test_the_offline_bases_are_none_of_the_released_models(base: str) -> None:
    assert released_shape(resolve_base(base).config("transformer")) is None


def test_the_trigger_is_the_one_caption_where_none_was_set_and_nothing_is_empty() -> None:
    of_a_caption = {**CONTRACT, "trigger": None}
    assert shown_metadata("diffusers", "a", of_a_caption)["modelspec.trigger_phrase"] == "a photo of sks dog"
    assert shown_metadata("diffusers", "a", {**CONTRACT, "encoders": ["clip_l"]})["modelspec.usage_hint"].endswith(
        "no T5"
    )
    assert shown_metadata("kohya", None, {}) == {"modelspec.sai_model_spec": "1.0.1",
                                                 "modelspec.implementation": "diffusers"}  # fmt: skip


def test_tags_are_the_parts_between_commas_the_most_frequent_first() -> None:
    assert list(tag_frequency(["b, a", "b", " a,,b ", ""]).items()) == [("b", 3), ("a", 2)]
    assert describe_tags({"a": 2}).endswith("holds 1 tag from the captions, for all to read (data.export_tags): 'a'")
    assert describe_tags(dict.fromkeys("abcdefg", 1)).endswith("'e' and 2 more")


def test_a_run_states_them_without_date_picture_or_captions(quick_config, tmp_path: Path) -> None:
    looked = "preview={every: 1, prompts: [a dog], steps: 1, guidance: 1.0}"
    run_training(quick_config(tmp_path / "run", "train.steps=1", "data.trigger=sks", "name=rex", looked))
    found = metadata_of(find_adapter(tmp_path / "run"))
    del found["lora_adapter_metadata"], found["sd3tune"]
    assert found == {
        "format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "diffusers",
        "modelspec.title": "rex", "ss_output_name": "rex", "modelspec.resolution": "64x64",
        "modelspec.trigger_phrase": "sks", "trained_words": "sks",
        "modelspec.usage_hint": "1 step, guidance 1, 16 T5 tokens",
    }  # fmt: skip
    lines = inspect_lora(tmp_path / "run")
    assert {"title     rex", "trigger   sks", "hint      1 step, guidance 1, 16 T5 tokens"} <= set(lines)
    header = json.dumps(metadata_of(find_adapter(tmp_path / "run")))
    assert not re.search(r"date|thumbnail|picture of sks", header)


def test_tags_are_exported_only_when_asked_and_are_named_first(quick_config, tmp_path: Path, capsys) -> None:
    run_training(quick_config(tmp_path / "run", "train.steps=1", "data.export_tags=true"))
    out = capsys.readouterr().out
    assert "note: the adapter's metadata holds 5 tags from the captions, for all to read (data.export_tags): " in out
    assert out.index("note: the adapter's metadata") < out.index("images: 5")
    found = json.loads(metadata_of(find_adapter(tmp_path / "run"))["ss_tag_frequency"])
    colours = ("red", "green", "blue", "orange", "purple")
    assert found == {"quick": {f"a {colour} picture of sks dog": 1 for colour in colours}}
    assert read_adapter(tmp_path / "run").contract["tag_frequency"] == found["quick"]


def test_inspect_shows_the_architecture_and_cannot_be_fooled(tmp_path: Path) -> None:
    said = {"modelspec.title": "a\nerror: none", "modelspec.architecture": "x/lora",
            "modelspec.thumbnail": "data:" + "A" * 9000}  # fmt: skip
    file = file_of(tmp_path, "transformer_blocks.3.attn2.to_q", 1536, **said)
    lines = inspect_lora(file)
    assert "arch      x/lora" in lines
    assert "thumbnail 9.0 kB in the header" in lines
    assert not any("\n" in line or "AAAA" in line for line in lines)

"""`sd3tune lora convert`: files that diffusers, kohya's tools, ComfyUI and we ourselves take. See also test_formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd3tune.adapter.attach import attach
from sd3tune.adapter.file import read_adapter
from sd3tune.commands.lora_convert import convert_lora
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError, RunError
from sd3tune.methods.start_from import check_start, starting_factors
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import empty_transformer, load_pipeline, load_transformer
from sd3tune.model.lora.layers import Layer
from sd3tune.model.lora.targets import select_modules

RANK, ALPHA = 4, 6.0
CONTRACT = {"contract_version": 1, "base": "tiny", "trigger": "sks", "max_sequence_length": 16}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """All attention projections of tiny; to_k's rank differs from to_q's, and alpha is 1.5 ranks in most modules."""
    transformer, tensors = empty_transformer(resolve_base("tiny")), {}
    for name in select_modules(transformer, "attention"):
        module, rank = transformer.get_submodule(name), 2 if name.endswith("to_k") else RANK
        down, up = torch.empty(rank, module.in_features), torch.empty(module.out_features, rank)
        tensors[f"transformer.{name}.lora_A.weight"] = down.normal_(0, 0.1, generator=generator(0, name))
        tensors[f"transformer.{name}.lora_B.weight"] = up.normal_(0, 0.1, generator=generator(1, name))
    peft = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.rank_pattern": {"to_k": 2}}
    file = tmp_path / "source.safetensors"
    save_file(tensors, file, {"sd3tune": json.dumps(CONTRACT), "lora_adapter_metadata": json.dumps(peft)})
    return file


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
def test_infer_and_start_from_take_every_form_as_the_same_adapter(
    velocity, source: Path, form: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    lines = convert_lora(source, form, out)
    assert lines[0].startswith(f"{out}: ")
    assert any("the ranks differ" in line for line in lines) == (form != "diffusers")
    before, after = read_adapter(source), read_adapter(out)
    assert after.contract == CONTRACT

    found, expected = (load_transformer(resolve_base("tiny"), torch.float32) for _ in range(2))
    assert attach(found, after, "default").unmatched == ()
    attach(expected, before, "default")
    torch.testing.assert_close(velocity(found), velocity(expected), rtol=0, atol=2e-6)

    layers = {name: Layer(len(down), 2.0) for name, (down, _) in before.factors.items()}
    check_start(after, empty_transformer(resolve_base("tiny")), layers)
    starts = [starting_factors(adapter, layers) for adapter in (before, after)]
    for name in layers:
        one, other = (start[f"{name}.lora_B"].double() @ start[f"{name}.lora_A"].double() for start in starts)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_a_plain_pipeline_loads_what_comes_back_from_kohyas_form(velocity, source: Path, tmp_path: Path) -> None:
    """diffusers itself has no loader for kohya's SD3 files; see its SD3LoraLoaderMixin.lora_state_dict."""
    convert_lora(source, "kohya", tmp_path / "k.safetensors")
    convert_lora(tmp_path / "k.safetensors", "diffusers", tmp_path / "d.safetensors")
    state = StableDiffusion3Pipeline.lora_state_dict(tmp_path / "d.safetensors")
    assert set(state) == set(load_file(source))
    pipeline = load_pipeline(resolve_base("tiny"), torch.float32, t5=False)
    pipeline.load_lora_weights(tmp_path / "d.safetensors")
    expected = load_transformer(resolve_base("tiny"), torch.float32)
    attach(expected, read_adapter(source), "default")
    torch.testing.assert_close(velocity(pipeline.transformer), velocity(expected), rtol=0, atol=2e-6)


def test_kohyas_metadata_is_added_and_what_describes_other_tensors_is_dropped(source: Path, tmp_path: Path) -> None:
    convert_lora(source, "kohya", tmp_path / "dog.safetensors")
    found = metadata_of(tmp_path / "dog.safetensors")
    assert json.loads(found.pop("sd3tune")) == CONTRACT
    shown = {
        "modelspec.sai_model_spec": "1.0.1", "modelspec.title": "dog", "modelspec.trigger_phrase": "sks",
        "trained_words": "sks", "modelspec.usage_hint": "16 T5 tokens",
    }  # fmt: skip
    assert found == {
        **shown, "format": "pt", "modelspec.implementation": "diffusers", "ss_output_name": "dog",
        "ss_network_module": "networks.lora_sd3", "ss_network_dim": "4", "ss_network_alpha": "4",
    }  # fmt: skip
    theirs = {"sshs_model_hash": "1", "modelspec.hash_sha256": "0x1", "modelspec.date": "2026-01-02", "ss_steps": "800",
              "modelspec.author": "me", "ss_base_model_version": "3-medium"}  # fmt: skip
    save_file(load_file(tmp_path / "dog.safetensors"), tmp_path / "b.safetensors", {**found, **theirs})
    convert_lora(tmp_path / "b.safetensors", "comfyui", tmp_path / "c.safetensors")
    assert metadata_of(tmp_path / "c.safetensors") == {
        **shown, "format": "pt", "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
        "ss_output_name": "c", "modelspec.date": "2026-01-02", "modelspec.author": "me", "ss_steps": "800",
        "ss_base_model_version": "3-medium",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("module", "width", "base", "version"),
    [
        ("transformer_blocks.3.attn2.to_q", 1536, None, "sd3.5"),
        ("transformer_blocks.30.attn.to_q", 2432, None, "sd3.5"),
        ("transformer_blocks.3.attn.to_q", 1536, None, "sd3"),
        ("transformer_blocks.3.attn.to_q", 1536, "stabilityai/stable-diffusion-3.5-medium", "sd3.5"),
    ],
)
def test_base_model_version(module: str, width: int, base: str | None, version: str, tmp_path: Path) -> None:
    tensors = {
        f"transformer.{module}.lora_A.weight": torch.ones(1, width),
        f"transformer.{module}.lora_B.weight": torch.ones(width, 1),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"sd3tune": json.dumps({"base": base})} if base else None)
    convert_lora(tmp_path / "a.safetensors", "kohya", tmp_path / "b.safetensors")
    assert metadata_of(tmp_path / "b.safetensors")["ss_base_model_version"] == version


def test_what_cannot_be_done_is_said_and_nothing_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(RunError, match="--to a1111: one of diffusers, kohya, comfyui"):
        convert_lora(source, "a1111", out)
    with pytest.raises(RunError, match=r"name it \*\.safetensors"):
        convert_lora(source, "kohya", tmp_path / "out")
    with pytest.raises(RunError, match="exists already"):
        convert_lora(source, "kohya", source)
    foreign: dict[str, Tensor] = {
        "transformer.proj_in.lora_A.weight": torch.ones(1, 4), "transformer.proj_in.lora_B.weight": torch.ones(4, 1)
    }  # fmt: skip
    save_file(foreign, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="--to kohya: proj_in: the original layout has no such linear layer"):
        convert_lora(tmp_path / "x.safetensors", "kohya", out)
    assert not out.exists()


def test_the_command_line_converts(source: Path, tmp_path: Path, command) -> None:
    out = tmp_path / "out.safetensors"
    done = command("lora", "convert", source, "--to", "comfyui", "--out", out)
    assert done.code == 0, done
    assert f"{out}: " in done.out
    assert read_adapter(out).layout == "ComfyUI"

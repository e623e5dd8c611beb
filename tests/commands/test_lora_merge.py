"""`sd3tune lora merge`: sums of adapters are the sums of what they add to the weights, computed here in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sd3tune.adapter.attach import attach
from sd3tune.adapter.file import read_adapter, write_adapter
from sd3tune.commands.lora_merge import merge_into_base, merge_loras
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError, ConfigError, ModelError, RunError
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import empty_transformer, load_transformer
from sd3tune.model.lora.targets import select_modules


def written(folder: Path, seed: int, targets: str = "attention", base: str = "tiny", **contract: object) -> Path:
    """An adapter of rank 2 + seed."""
    transformer, factors = empty_transformer(resolve_base(base)), {}
    for name in select_modules(transformer, targets):
        module = transformer.get_submodule(name)
        factors[f"{name}.lora_A"] = 0.1 * torch.randn(2 + seed, module.in_features, generator=generator(seed, name))
        factors[f"{name}.lora_B"] = 0.1 * torch.randn(
            module.out_features, 2 + seed, generator=generator(seed + 9, name)
        )
    stated = {"base": base, "base_kind": "tiny", "base_fingerprint": "f" * 8, "encoders": ["clip_l", "clip_g", "t5"]}
    return write_adapter(folder / str(seed), factors, {**stated, "max_sequence_length": 16, **contract})


def changes(file: Path, weight: float = 1.0) -> dict[str, Tensor]:
    tensors = load_file(file)
    return {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"):
        weight * tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        for key in tensors if "lora_A" in key
    }  # fmt: skip


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """One on all attention and one on the image stream's alone, with weights."""
    one = written(tmp_path, 1, trigger="sks", resolution=512)
    other = written(tmp_path, 2, "attention-image", trigger="ohwx")
    return [f"{one}@0.8", f"{other}@-0.5"]


def expected_of(two: list[str]) -> dict[str, Tensor]:
    one, other = (changes(Path(file), float(weight)) for file, _, weight in (text.partition("@") for text in two))
    return {name: change + other.get(name, 0) for name, change in one.items()}


def test_concatenation_is_exact_and_its_contract_says_what_was_merged(two: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert merge_loras(two, out, "diffusers", "concat", None) == [
        f"{out}: {len(expected_of(two))} modules of rank 7 at most, from 2 adapters"
    ]
    for name, change in changes(out).items():
        torch.testing.assert_close(change, expected_of(two)[name], rtol=0, atol=1e-8)
    contract = read_adapter(out).contract
    assert contract["trigger"] == "sks, ohwx"
    assert (contract["base"], contract["resolution"], contract["rank"]) == ("tiny", 512, 7)
    assert [one["weight"] for one in contract["merged"]] == [0.8, -0.5]


def test_svd_is_the_nearest_of_its_rank(two: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    (_, line) = merge_loras(two, out, "diffusers", "svd", 3)
    lost, total, worst = 0.0, 0.0, 0.0
    for name, change in expected_of(two).items():
        values = torch.linalg.svdvals(change).square()
        found = (changes(out)[name] - change).square().sum()
        torch.testing.assert_close(found, values[3:].sum(), rtol=1e-4, atol=1e-9)
        lost, total = lost + values[3:].sum().item(), total + values.sum().item()
        worst = max(worst, (values[3:].sum() / values.sum()).item() ** 0.5)
    assert line.startswith(
        f"lost: {(lost / total) ** 0.5:.3%} of the weight update's norm, at most {worst:.3%} in one module"
    )


def test_in_the_base_the_adapters_compute_the_same_and_the_folder_is_a_base(
    velocity, two: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "model"
    merge_into_base(two, out, None)
    merged = resolve_base(str(out))
    transformer = load_transformer(resolve_base("tiny"), torch.float32)
    for number, text in enumerate(two):
        attach(transformer, read_adapter(text.partition("@")[0]), str(number))
    transformer.set_adapters(["0", "1"], [0.8, -0.5])
    found = velocity(load_transformer(merged, torch.float32))
    torch.testing.assert_close(found, velocity(transformer), rtol=0, atol=2e-5)
    assert merged.contract["trigger"] == "sks, ohwx"
    assert merged.contract["encoders"] == ["clip_l", "clip_g", "t5"]
    assert (out / "text_encoder_3" / "config.json").is_file()


def test_a_base_in_bf16_stays_in_bf16(two: list[str], tiny_in_bf16: str, tmp_path: Path) -> None:
    merge_into_base(two, tmp_path / "model", tiny_in_bf16)
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    name = "transformer_blocks.0.attn.to_q"
    base = load_file(Path(tiny_in_bf16) / "transformer" / file.name)[f"{name}.weight"]
    found = load_file(file)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.equal(found[f"{name}.weight"], (base.double() + expected_of(two)[name]).float().bfloat16())


def test_what_cannot_be_merged_is_said(two: list[str], single_file, tmp_path: Path) -> None:
    out, other = tmp_path / "out.safetensors", written(tmp_path, 3, base="tiny-sd35-large", base_fingerprint="other")
    cases: list[tuple[type[Exception], str, tuple]] = [
        (AdapterError, "they were made for different bases", ([two[0], str(other)], out, "diffusers", "concat", None)),
        (AdapterError, "^x@y: 'y' is not a weight", (["x@y"], out, "diffusers", "concat", None)),
        (ConfigError, "--method svd needs --rank R", (two, out, "diffusers", "svd", None)),
        (ConfigError, "--rank 3: only with --method svd", (two, out, "diffusers", "concat", 3)),
        (ConfigError, "--rank 0: at least 1", (two, out, "diffusers", "svd", 0)),
        (ConfigError, "--method ties: one of concat, svd", (two, out, "diffusers", "ties", None)),
        (RunError, "--to a1111: one of", (two, out, "a1111", "concat", None)),
    ]
    for kind, says, arguments in cases:
        with pytest.raises(kind, match=says):
            merge_loras(*arguments)
    with pytest.raises(AdapterError, match="made for another base"):
        merge_into_base([str(other)], tmp_path / "model", "tiny")
    with pytest.raises(ModelError, match="--into-base writes a whole model in diffusers' layout, and a single file"):
        merge_into_base(two, tmp_path / "model", str(single_file("tiny")))
    with pytest.raises(RunError, match="exists already"):
        merge_into_base(two, tmp_path, None)
    huge = [two[0].replace("@0.8", "@1e40")]
    with pytest.raises(AdapterError, match=r"not written: .* tensors are NaN or infinite"):
        merge_loras(huge, out, "diffusers", "concat", None)
    with pytest.raises(AdapterError, match=r"not written: with the adapters .* exceeds the range of fp32"):
        merge_into_base(huge, tmp_path / "model", None)
    assert not out.exists()
    assert not (tmp_path / "model").exists()


def test_adapters_that_disagree_about_their_conditions_are_named(two: list[str], tmp_path: Path) -> None:
    other = written(tmp_path, 3, base_fingerprint="other", max_sequence_length=77)
    lines = merge_loras([two[0], str(other)], tmp_path / "out.safetensors", "comfyui", "concat", None)
    assert [line.partition(";")[0] for line in lines if line.startswith("warning: ")] == [
        f"warning: {other} was trained with another base", f"warning: {other} was trained with another T5 length"
    ]  # fmt: skip
    assert read_adapter(tmp_path / "out.safetensors").contract["max_sequence_length"] == 16


def test_the_command_line_merges(two: list[str], tmp_path: Path, command) -> None:
    out = tmp_path / "out.safetensors"
    for more, code in ((["--out", out, "--to", "kohya"], 0), (["--out", out, "--into-base", "--rank", "2"], 2),
                       (["--out", tmp_path / "x.safetensors", "--base", "tiny"], 2)):  # fmt: skip
        done = command("lora", "merge", *two, *more)
        assert done.code == code, done
    with safe_open(out, framework="pt") as opened:
        assert json.loads(opened.metadata()["sd3tune"])["method"] == "merge"

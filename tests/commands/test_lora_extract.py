"""`sd3tune lora extract`: a merged adapter is found again, and what is lost is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sd3tune.adapter.attach import attach
from sd3tune.adapter.file import read_adapter
from sd3tune.commands.lora_extract import extract_lora
from sd3tune.data.sampler import generator
from sd3tune.errors import ConfigError, ModelError, RunError
from sd3tune.model.base.folder import write_model
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_transformer

RANK = 3
MODULES = ("transformer_blocks.0.attn.to_q", "transformer_blocks.2.ff.net.2", "transformer_blocks.3.ff.net.0.proj")


def tuned(folder: Path, rank: int = RANK, bias: float = 0.0) -> tuple[str, dict[str, Tensor]]:
    """A folder of tiny with a change of `rank` in three modules, and the changes."""
    base, changes = resolve_base("tiny"), {}
    tensors = dict(load_transformer(base, torch.float32).state_dict())
    for name in MODULES:
        weight, source = tensors[f"{name}.weight"], generator(1, name)
        up, down = (
            torch.randn(len(weight), rank, generator=source),
            torch.randn(rank, weight.shape[1], generator=source),
        )
        changes[name] = up.double() @ down.double() / 8
        tensors[f"{name}.weight"] = (weight.double() + changes[name]).float()
        tensors[f"{name}.bias"] = tensors[f"{name}.bias"] + bias
    write_model(
        folder, base, tensors, {"trigger": "sks dog", "guidance": 3.0, "encoders": ["clip_l", "clip_g", "t5"]}, None
    )
    return str(folder), changes


def test_a_change_of_low_rank_is_found_again(velocity, tmp_path: Path) -> None:
    model, changes = tuned(tmp_path / "model")
    lines = extract_lora("tiny", model, RANK, tmp_path / "a.safetensors", "diffusers")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert set(adapter.factors) == set(MODULES)
    for name, (down, up) in adapter.folded().items():
        torch.testing.assert_close(up.double() @ down.double(), changes[name], rtol=0, atol=1e-5)
    assert lines[0].endswith(f"3 modules of rank 3: {model} - tiny")
    assert "lost: 0.000% of the weight update's norm" in lines[1]
    assert (adapter.contract["base"], adapter.contract["trigger"], adapter.contract["guidance"]) == (
        "tiny", "sks dog", 3.0,
    )  # fmt: skip
    transformer = load_transformer(resolve_base("tiny"), torch.float32)
    attach(transformer, adapter, "default")
    whole = velocity(load_transformer(resolve_base(model), torch.float32))
    torch.testing.assert_close(velocity(transformer), whole, rtol=0, atol=1e-4)


def test_the_error_is_that_of_the_best_approximation(tmp_path: Path) -> None:
    """Against torch's SVD."""
    model, changes = tuned(tmp_path / "model", rank=8, bias=0.1)
    lines = extract_lora("tiny", model, 2, tmp_path / "a.safetensors", "kohya")
    values = {name: torch.linalg.svdvals(change).square() for name, change in changes.items()}
    lost, total = sum(of[2:].sum() for of in values.values()), sum(of.sum() for of in values.values())
    found = re.fullmatch(r"lost: ([\d.]+)% of the weight update's norm, at most .*", lines[1])
    assert found is not None
    assert float(found[1]) / 100 == pytest.approx((lost / total).sqrt().item(), rel=1e-4)
    first = values[MODULES[0]]
    assert f"block 0 {(first[2:].sum() / first.sum()).sqrt().item():.3%}, block 2 " in lines[2]
    assert "left out: transformer_blocks.0.attn.to_q.bias and 2 more, which a LoRA cannot hold" in lines[3]


def test_what_cannot_be_extracted_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(ModelError, match=r"it was not tuned from tiny: .* in tiny and .* in tiny-sd3"):
        extract_lora("tiny", "tiny-sd3", 2, out, "diffusers")
    with pytest.raises(ModelError, match="there is nothing to extract"):
        extract_lora("tiny", "tiny", 2, out, "diffusers")
    with pytest.raises(ConfigError, match="--rank 0: at least 1"):
        extract_lora("tiny", "tiny", 0, out, "diffusers")
    with pytest.raises(RunError, match="--to a1111: one of diffusers, kohya, comfyui, lycoris"):
        extract_lora("tiny", "tiny", 2, out, "a1111")
    assert not out.exists()


def test_the_command_line_extracts(tmp_path: Path, command) -> None:
    model, _ = tuned(tmp_path / "model")
    done = command("lora", "extract", "tiny", model, "--rank", "2", "--out", tmp_path / "a.safetensors")
    assert done.code == 0
    assert "3 modules of rank 2" in done.out

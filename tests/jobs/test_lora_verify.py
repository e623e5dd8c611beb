"""`sd3tune lora verify`: what a fresh diffusers pipeline takes, and what must not pass."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd3tune.cli.main import run
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError
from sd3tune.jobs.lora_convert import convert_lora
from sd3tune.jobs.lora_verify import verify_lora
from sd3tune.model.adapter_io import write_adapter
from sd3tune.model.bases import resolve_base
from sd3tune.model.components import empty_transformer
from sd3tune.model.targets import select_modules

BASES = ["tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large"]
QUERY = "transformer_blocks.0.attn.to_q"


def factors(base: str = "tiny") -> dict[str, Tensor]:
    transformer, found = empty_transformer(resolve_base(base)), {}
    for name in select_modules(transformer, "attention"):
        module, rank = transformer.get_submodule(name), 2 if name.endswith("to_k") else 3
        found[f"{name}.lora_A"] = 0.1 * torch.randn(rank, module.in_features, generator=generator(0, name))
        found[f"{name}.lora_B"] = 0.1 * torch.randn(module.out_features, rank, generator=generator(1, name))
    return found


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_of_ours_passes_and_so_does_its_other_form(base: str, tmp_path: Path) -> None:
    file = write_adapter(tmp_path, factors(base), {"base": base, "base_kind": "tiny"})
    lines = verify_lora(file, None, "auto")
    assert f"{len(factors(base))} tensors of {len(factors(base)) // 2} modules loaded by diffusers" in lines[0]
    assert "none left over" in lines[0]
    assert "one step in fp32: finite, and " in lines[1]
    convert_lora(file, "kohya", tmp_path / "kohya.safetensors")
    assert verify_lora(tmp_path / "kohya.safetensors", None, "auto")[1] == lines[1]


def test_an_rslora_file_of_peft_passes(tmp_path: Path) -> None:
    tensors = {f"transformer.{name}.weight": value for name, value in factors().items()}
    peft = {
        "r": 3, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"attn.to_k": 2, "attn2.to_k": 2},
        "target_modules": [name.removesuffix(".lora_A") for name in factors() if name.endswith("A")],
    }  # fmt: skip
    described = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in peft.items()})}
    save_file(tensors, tmp_path / "x.safetensors", described)
    assert "none left over" in verify_lora(tmp_path / "x.safetensors", "tiny", "auto")[0]


def changed(tmp_path: Path, **tensors: Tensor | None) -> Path:
    file = write_adapter(tmp_path, factors(), {"base": "tiny", "base_kind": "tiny"})
    held = {**load_file(file), **{f"transformer.{name}": value for name, value in tensors.items() if value is not None}}
    save_file(held, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def test_zero_b_another_base_and_what_diffusers_does_not_take_are_refused(tmp_path: Path) -> None:
    zero = {name: value * (not name.endswith("B")) for name, value in factors().items()}
    file = write_adapter(tmp_path / "zero", zero, {"base": "tiny", "base_kind": "tiny"})
    with pytest.raises(AdapterError, match="it changes nothing of what tiny predicts"):
        verify_lora(file, None, "auto")
    with pytest.raises(AdapterError, match=r"modules are not in tiny-sd3: transformer_blocks\.\d\.attn2"):
        verify_lora(file, "tiny-sd3", "auto")
    with pytest.raises(AdapterError, match=r"diffusers does not load it: .*; `sd3tune lora convert --to diffusers`"):
        verify_lora(changed(tmp_path, **{f"{QUERY}.alpha": torch.tensor(3.0)}), "tiny", "auto")
    with pytest.raises(AdapterError, match="the prediction of tiny is NaN or infinite"):
        verify_lora(changed(tmp_path, **{f"{QUERY}.lora_B.weight": torch.full((64, 3), 3e38)}), "tiny", "auto")


def test_the_command_line_says_so_by_its_exit_code(tmp_path: Path, monkeypatch, capsys) -> None:
    file = write_adapter(tmp_path, factors(), {"base": "tiny", "base_kind": "tiny"})
    for arguments, code in (([], 0), (["--base", "tiny-sd3"], 2), (["--dtype", "int8"], 2)):
        monkeypatch.setattr(sys, "argv", ["sd3tune", "lora", "verify", str(file), *arguments])
        with pytest.raises(SystemExit) as stopped:
            run()
        assert (stopped.value.code or 0) == code
        printed = capsys.readouterr()
        assert len([line for line in printed.err.splitlines() if line.startswith("error: ")]) == (code == 2)

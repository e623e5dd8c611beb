"""`sd3tune lora verify`: what a fresh diffusers pipeline takes, and what must not pass."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd3tune.adapter.file import write_adapter
from sd3tune.commands.lora_convert import convert_lora
from sd3tune.commands.lora_verify import verify_lora
from sd3tune.commands.train import run_training
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError
from sd3tune.files.png_recipe import RECIPE_KEY
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import empty_transformer
from sd3tune.model.lora.targets import select_modules
from sd3tune.run.verify_preview import psnr

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
    with pytest.raises(AdapterError, match="it does not change the prediction of tiny"):
        verify_lora(file, None, "auto")
    with pytest.raises(AdapterError, match=r"modules are not in tiny-sd3: transformer_blocks\.\d\.attn2"):
        verify_lora(file, "tiny-sd3", "auto")
    with pytest.raises(AdapterError, match=r"diffusers does not load it: .*; `sd3tune lora convert --to diffusers`"):
        verify_lora(changed(tmp_path, **{f"{QUERY}.alpha": torch.tensor(3.0)}), "tiny", "auto")
    with pytest.raises(AdapterError, match="the prediction of tiny is NaN or infinite"):
        verify_lora(changed(tmp_path, **{f"{QUERY}.lora_B.weight": torch.full((64, 3), 3e38)}), "tiny", "auto")


def test_the_command_line_says_so_by_its_exit_code(tmp_path: Path, command) -> None:
    file = write_adapter(tmp_path, factors(), {"base": "tiny", "base_kind": "tiny"})
    for arguments, code in (([], 0), (["--no-preview"], 0), (["--base", "tiny-sd3"], 2), (["--dtype", "int8"], 2)):
        done = command("lora", "verify", file, *arguments)
        assert done.code == code
        assert len([line for line in done.err.splitlines() if line.startswith("error: ")]) == (code == 2)
        assert ("no preview to compare with" in done.out) == (arguments == [])


# What the training drew


@pytest.fixture(scope="module")
def run(quick_config, tmp_path_factory) -> Path:
    """Previews at steps 2 and 3 of the average; read only."""
    run = tmp_path_factory.mktemp("runs") / "seen"
    looked = "preview={every: 2, prompts: [a photo of sks dog, a cat], steps: 2, guidance: 3.0, seed: 5}"
    run_training(
        quick_config(run, looked, "ema={decay: 0.5}", "checkpoint.every=2", "validation={holdout: 1, every: 2}")
    )
    return run


def compared(location: Path, base: str | None = None, dtype: str = "auto") -> str:
    return verify_lora(location, base, dtype)[2]


def test_diffusers_draws_the_previews_of_a_run_and_its_checkpoints_to_the_pixel(run: Path) -> None:
    for location, step in ((run, 3), (run / "checkpoints" / "step-000002", 2)):
        drawn = f"step-{step:06d}-0.png, a preview of step {step}, drawn again by diffusers: equal to the pixel"
        assert compared(location) == drawn
    best = json.loads((run / "best" / "validation.json").read_text())["step"]
    assert compared(run / "best").startswith(f"step-{best:06d}-0.png, ")


def test_so_it_does_without_t5_and_without_guidance(quick_config, tmp_path: Path) -> None:
    looked = "preview={every: 9, prompts: [a photo of sks dog], steps: 1, guidance: 1.0}"
    run_training(quick_config(tmp_path / "run", looked, "model.t5=false", "train.steps=1"))
    assert compared(tmp_path / "run").endswith("equal to the pixel")


def test_without_a_preview_of_these_weights_it_says_why(run: Path, tmp_path: Path) -> None:
    file = run / "adapter" / "pytorch_lora_weights.safetensors"
    assert compared(run / "adapter_raw") == (
        "no preview to compare with: the run drew none at step 3 with these weights"
    )
    bare = Path(shutil.copy(file, tmp_path / "bare.safetensors"))
    assert compared(bare) == "no preview to compare with: the file does not lie in the folder of a run"
    inside = Path(shutil.copytree(run, tmp_path / "run"))
    moved = Path(shutil.copy(file, inside / "mine.safetensors"))
    assert compared(moved).endswith("the file is not an export of a finished run")
    other = Path(shutil.copytree(resolve_base("tiny").path, tmp_path / "other"))
    weights = other / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert compared(run, str(other)).endswith(f"it was trained on tiny, and this is {other}")
    for picture in inside.glob("samples/step-000003-*.png"):
        picture.unlink()
    assert compared(inside).endswith("the run drew none at step 3")
    (inside / "run.json").write_text('{"sd3tune_run": 1, "report": 1}')
    assert "is damaged" in compared(inside / "checkpoints" / "step-000002")


def test_another_picture_is_refused_and_another_precision_is_told(run: Path, tmp_path: Path) -> None:
    told = compared(run, dtype="bf16")
    assert "dB, in bf16 on cpu, and fp32 on cpu in training" in told
    changed = Path(shutil.copytree(run, tmp_path / "run"))
    shown = changed / "samples" / "step-000003-0.png"
    info = PngInfo()
    info.add_itxt(RECIPE_KEY, Image.open(shown).info[RECIPE_KEY])
    Image.open(changed / "samples" / "step-000003-1.png").save(shown, pnginfo=info)
    with pytest.raises(AdapterError, match=r"diffusers draws another picture than the training did: .*PSNR \d+\.\d dB"):
        compared(changed)
    assert len(verify_lora(changed, None, "auto", preview=False)) == 2


def test_psnr_is_that_of_its_definition() -> None:
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (1, 1, 1))
    assert psnr(black, black) == math.inf
    assert psnr(black, grey) == pytest.approx(48.1308, abs=1e-4)  # 20 log10 255
    assert psnr(black, grey.resize((8, 8))) == -math.inf

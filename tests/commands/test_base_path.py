"""Runs on a base of files: the adapter of the folder's run, found again by `infer`; T5 left out; Turbo; mistakes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from sd3tune.adapter.file import read_adapter
from sd3tune.cli.main import run as command_line
from sd3tune.commands.cache import run_cache
from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.errors import AdapterError, ModelError, UserError
from sd3tune.inference.conditions import settle_conditions
from sd3tune.inference.job import InferenceJob
from sd3tune.model.base.parts import ENCODERS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.base.weights import tensor_headers

SIZE = {"steps": 2, "guidance": 3.0, "size": (64, 64), "before": False}


def of_files(file: Path, t5: bool = True) -> tuple[str, ...]:
    """The overrides that make a run use this single file and the encoders beside it."""
    encoders = {
        name: str(file.with_name(f"{name}.safetensors")) for name in ("clip_l", "clip_g", "t5")[: 3 if t5 else 2]
    }
    return (
        f"model.base={file}",
        f"model.text_encoders={encoders}",
        "model.tokenizers=tiny",
        f"model.t5={str(t5).lower()}",
    )


def code_block(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def run_on_file(quick_config, single_file, tiny_in_bf16: str, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "on-file"
    run_training(quick_config(run, *of_files(single_file(tiny_in_bf16))))
    return run


@pytest.fixture(scope="module")
def run_on_folder(quick_config, tiny_in_bf16: str, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "on-folder"
    run_training(quick_config(run, f"model.base={tiny_in_bf16}"))
    return run


def test_a_single_file_trains_the_folders_adapter(run_on_file: Path, run_on_folder: Path, adapter_of) -> None:
    ours, theirs = adapter_of(run_on_file), adapter_of(run_on_folder)
    assert ours.keys() == theirs.keys()
    assert all(ours[key].numpy().tobytes() == theirs[key].numpy().tobytes() for key in theirs)


def test_the_contract_names_the_files_and_no_path(run_on_file: Path, single_file, tiny_in_bf16: str) -> None:
    contract = read_adapter(run_on_file).contract
    assert (contract["base"], contract["base_kind"]) == ("model.safetensors", "file")
    assert contract["base_released_as"] is None
    assert {name: used["file"] for name, used in contract["encoder_files"].items()} == {
        name: f"{name}.safetensors" for name in ("clip_l", "clip_g", "t5")
    }
    assert "/" not in str(contract)
    card = (run_on_file / "README.md").read_text()
    assert str(single_file(tiny_in_bf16).parent) not in card
    assert "diffusers alone cannot draw with it" in card  # a shape that was not released


def test_infer_finds_the_file_and_its_encoders_through_the_run(
    run_on_file: Path, run_on_folder: Path, tmp_path: Path, capsys
) -> None:
    pictures = [
        run_infer(InferenceJob.from_fields(loras=[str(run)], prompt="sks dog", out=tmp_path / run.name, **SIZE))[0]
        for run in (run_on_file, run_on_folder)
    ]
    assert Image.open(pictures[0]).tobytes() == Image.open(pictures[1]).tobytes()
    assert "warning" not in capsys.readouterr().out


def test_infer_with_a_bare_adapter_is_told_where_the_files_are(
    run_on_file: Path, single_file, tiny_in_bf16: str, tmp_path: Path, capsys
) -> None:
    bare = tmp_path / "rex.safetensors"
    shutil.copy(run_on_file / "adapter" / "pytorch_lora_weights.safetensors", bare)
    file = single_file(tiny_in_bf16)
    request = {"loras": [str(bare)], "prompt": "sks dog", **SIZE}
    with pytest.raises(AdapterError, match=r"trained on a local file named 'model\.safetensors'; give it with --base"):
        run_infer(InferenceJob.from_fields(out=tmp_path / "a", **request))
    with pytest.raises(ModelError, match=r"CLIP-L is not in this file: .*for infer: in a --config YAML") as caught:
        run_infer(InferenceJob.from_fields(out=tmp_path / "a", base=str(file), **request))
    assert len(caught.value.problems) == 4  # the encoders, and the tokenizers of an unknown shape
    capsys.readouterr()
    expected = run_infer(InferenceJob.from_fields(out=tmp_path / "run", **{**request, "loras": [str(run_on_file)]}))[0]
    config = run_on_file / "config.yaml"
    for number, more in enumerate(({"config": config}, {"config": config, "base": str(file)})):
        (found,) = run_infer(InferenceJob.from_fields(out=tmp_path / str(number), **more, **request))
        assert Image.open(found).tobytes() == Image.open(expected).tobytes()
    assert "warning" not in capsys.readouterr().out
    run_infer(InferenceJob.from_fields(out=tmp_path / "tiny", base="tiny", **request))
    printed = capsys.readouterr().out
    assert "was trained on model.safetensors; tiny is assumed to hold the same weights" in printed
    assert "was trained with CLIP-L from clip_l.safetensors, and another is used" in printed


def test_an_encoder_of_ones_own_stands_in_for_the_folders(
    quick_config, single_file, tiny_in_bf16: str, tmp_path: Path, adapter_of, run_on_folder: Path, capsys
) -> None:
    tensors = load_file(single_file(tiny_in_bf16).with_name("clip_g.safetensors"))
    tensors["text_projection.weight"] *= 2
    save_file(tensors, tmp_path / "my_clip_g.safetensors")
    own = f"model.text_encoders.clip_g={tmp_path / 'my_clip_g.safetensors'}"
    run_training(quick_config(tmp_path / "run", f"model.base={tiny_in_bf16}", own))
    assert "encoders  clip_g from my_clip_g.safetensors\n" in capsys.readouterr().out
    assert read_adapter(tmp_path / "run").contract["encoder_files"].keys() == {"clip_g"}
    ours, theirs = adapter_of(tmp_path / "run"), adapter_of(run_on_folder)
    assert any(not torch.equal(ours[key], theirs[key]) for key in theirs)
    run_infer(
        InferenceJob.from_fields(loras=[str(tmp_path / "run")], prompt="sks dog", out=tmp_path / "images", **SIZE)
    )
    assert "warning" not in capsys.readouterr().out  # with its own clip_g again


# Without T5


def test_a_folder_without_t5_goes_all_the_way(quick_config, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(resolve_base("tiny").path, tmp_path / "no-t5"))
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    config = quick_config(
        tmp_path / "run", f"model.base={folder}", "model.t5=false", "train.steps=1",
        "preview={every: 1, prompts: [a dog], steps: 1, guidance: 3.0}",
    )  # fmt: skip
    run_cache(config)
    run_training(config)
    contract = read_adapter(tmp_path / "run").contract
    assert contract["encoders"] == ["clip_l", "clip_g"]
    snippet = code_block((tmp_path / "run" / "README.md").read_text())
    compile(snippet, "card", "exec")
    assert "text_encoder_3=None, tokenizer_3=None" in snippet

    request = InferenceJob.from_fields(
        loras=[str(tmp_path / "run")], prompt="sks dog", out=tmp_path / "images", seed=7, **SIZE
    )
    (found,) = run_infer(request)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        resolve_base("tiny").path, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "run" / "adapter")
    expected = pipeline(
        "sks dog", height=64, width=64, num_inference_steps=2, guidance_scale=3.0, max_sequence_length=16,
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    assert Image.open(found).tobytes() == expected.tobytes()


def test_a_config_without_t5_draws_with_a_base_alone(run_on_file: Path, single_file, tmp_path: Path) -> None:
    saved = yaml.safe_load((run_on_file / "config.yaml").read_text())
    saved["model"] |= {"t5": False, "text_encoders": {**saved["model"]["text_encoders"], "t5": None}}
    (tmp_path / "no-t5.yaml").write_text(yaml.safe_dump(saved))
    request = {"loras": [], "prompt": "a dog", "config": tmp_path / "no-t5.yaml", **SIZE}
    assert len(run_infer(InferenceJob.from_fields(out=tmp_path / "images", **request))) == 1


def test_the_t5_file_is_not_looked_at_without_t5(quick_config, single_file, tmp_path: Path) -> None:
    file = single_file("tiny")
    gone = [*of_files(file), f"model.text_encoders.t5={tmp_path / 'gone.safetensors'}"]
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        run_training(quick_config(tmp_path / "run", *gone), dry_run=True)
    run_training(quick_config(tmp_path / "run", *gone, "model.t5=false", "train.steps=1"))
    assert read_adapter(tmp_path / "run").contract["encoder_files"].keys() == {"clip_l", "clip_g"}


# What is said, and what is refused


@pytest.mark.parametrize("name", ["sd3.5_large_turbo.safetensors", "sd3.5_large.safetensors"])
def test_a_turbo_model_is_warned_about(quick_config, single_file, tmp_path: Path, capsys, name: str) -> None:
    for file in single_file("tiny").parent.iterdir():
        shutil.copy(file, tmp_path / (name if file.name == "model.safetensors" else file.name))
    run_training(quick_config(tmp_path / "run", *of_files(tmp_path / name)), dry_run=True)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == ("turbo" in name)
    assert all("train on the model without Turbo" in line for line in warnings)
    assert all("set preview.guidance=1 and preview.steps=4, which `infer` follows" in line for line in warnings)
    of_turbo = ("preview.guidance=1", "preview.steps=4")
    run_training(quick_config(tmp_path / "run", *of_files(tmp_path / name), *of_turbo), dry_run=True)
    assert "set preview.guidance" not in capsys.readouterr().out


def test_drawing_with_a_turbo_model_as_if_it_were_none_is_warned_about(single_file, tmp_path: Path, capsys) -> None:
    files = single_file("tiny").parent
    shutil.copy(files / "model.safetensors", tmp_path / "sd3.5_turbo.safetensors")
    encoders = {name: str(files / f"{name}.safetensors") for name in ENCODERS}
    model = {"base": "./sd3.5_turbo.safetensors", "text_encoders": encoders, "tokenizers": "tiny"}
    (tmp_path / "c.yaml").write_text(json.dumps({"model": model, "data": {"sources": [{"path": "."}]}}))
    for guidance in (7.0, 1.0):
        settle_conditions(
            InferenceJob.from_fields(
                loras=[], prompt="a dog", out=tmp_path, config=tmp_path / "c.yaml", guidance=guidance
            ),
            [],
        )
        assert ("warning: sd3.5_turbo.safetensors is a Turbo model" in capsys.readouterr().out) == (guidance > 1)


def write_tensors(file: Path, *names: str) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, file)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


MISTAKES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "an SDXL file": (
        lambda folder: write_tensors(folder / "bad.safetensors", "conditioner.embedders.1.model.ln_final.weight"),
        "model.base={folder}/bad.safetensors",
        "bad.safetensors: a Stable Diffusion XL model, not a Stable Diffusion 3 or 3.5 checkpoint",
    ),
    "a LoRA as a base": (
        lambda folder: write_tensors(
            folder / "bad.safetensors", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
        ),
        "model.base={folder}/bad.safetensors",
        "bad.safetensors: a LoRA, not a Stable Diffusion 3 or 3.5 checkpoint",
    ),
    "a pickle": (
        lambda folder: (folder / "bad.ckpt").write_bytes(b"PK"),
        "model.base={folder}/bad.ckpt",
        "bad.ckpt: pickled weights are refused, as they can run any code; get the .safetensors file",
    ),
    "a truncated base": (
        lambda folder: cut(folder / "model.safetensors"),
        "seed=0",
        "model.safetensors: truncated or not a safetensors file",
    ),
    "a truncated encoder": (
        lambda folder: cut(folder / "t5.safetensors"),
        "seed=0",
        "t5.safetensors: truncated or not a safetensors file",
    ),
    "no T5": (
        lambda folder: None,
        "model.text_encoders.t5=null",
        "T5 is not in this file: name the file that holds it in model.text_encoders.t5",
    ),
    "clip_g as clip_l": (
        lambda folder: shutil.copy(folder / "clip_g.safetensors", folder / "clip_l.safetensors"),
        "seed=0",
        "pooled vectors of 32 and 32, and this base expects 48 together",
    ),
    "no tokenizers": (
        lambda folder: None,
        "model.tokenizers=null",
        "a single file holds no tokenizers, and its shape is unknown; give model.tokenizers: a folder",
    ),
    "tokenizers that are elsewhere": (
        lambda folder: None,
        "model.tokenizers={folder}/nowhere",
        "tokenizers: {folder}/nowhere: no such folder",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_run_folder(
    run_on_file: Path, single_file, tmp_path: Path, monkeypatch, capsys, case: str
) -> None:
    spoil, override, message = MISTAKES[case]
    for file in single_file("tiny").parent.iterdir():
        shutil.copy(file, tmp_path)
    spoil(tmp_path)
    arguments = [*of_files(tmp_path / "model.safetensors"), override.format(folder=tmp_path)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["sd3tune", "train", str(run_on_file / "config.yaml"), "output_dir=run", *arguments]
    )
    with pytest.raises(SystemExit) as caught:
        command_line()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message.format(folder=tmp_path) in line
    assert not (tmp_path / "run").exists()


def test_relative_paths_in_a_yaml_are_relative_to_it(
    run_on_file: Path, single_file, tmp_path: Path, monkeypatch
) -> None:
    models = tmp_path / "models"
    shutil.copytree(single_file("tiny").parent, models)
    saved = yaml.safe_load((run_on_file / "config.yaml").read_text())
    names = {name: f"models/{name}.safetensors" for name in ("clip_l", "clip_g", "t5")}
    saved["model"] |= {"base": "models/model.safetensors", "text_encoders": names}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(saved))
    monkeypatch.chdir("/")
    model = load_config(tmp_path / "run.yaml").config.model
    assert model.base == str(models / "model.safetensors")
    assert model.text_encoders is not None
    assert model.text_encoders.t5 == str(models / "t5.safetensors")
    assert model.tokenizers == "tiny"
    assert tensor_headers(Path(model.base))
    shutil.rmtree(models)
    assert load_config(tmp_path / "run.yaml").config.model.base == str(models / "model.safetensors")

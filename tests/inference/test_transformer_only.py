"""`--transformer-only`: of files that adapt the text encoders, too, the transformer part is used, and it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd3tune.adapter.file import read_adapter
from sd3tune.adapter.rearrange import arrange
from sd3tune.cli.main import app
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError
from sd3tune.methods import LoraMethod
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import empty_transformer, load_transformer
from sd3tune.model.lora.targets import select_modules

LEFT_OUT = "left out: 4 tensors for the text encoders (OneTrainer's embeddings 1, CLIP-L 2, CLIP-G 1; first: "


def transformer_part() -> dict[str, Tensor]:
    """kohya's file for `tiny` with a strong change."""
    transformer, factors = empty_transformer(resolve_base("tiny")), {}
    for name in select_modules(transformer, "attention"):
        module, source = transformer.get_submodule(name), generator(0, name)
        down, up = (torch.randn(*shape, generator=source) / 4 for shape in ((2, module.in_features),
                                                                         (module.out_features, 2)))  # fmt: skip
        factors[name] = (down, up)
    return arrange(factors, "kohya")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    text = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(()),
        "bundle_emb.sks.clip_l": torch.ones(2, 8),
    }
    save_file({**transformer_part(), **text}, tmp_path / "both.safetensors")
    save_file(transformer_part(), tmp_path / "part.safetensors")
    return tmp_path / "both.safetensors"


def command(*words: object) -> None:
    app([str(word) for word in words], standalone_mode=False)


COMMANDS = {
    "convert": ("--to", "diffusers", "--out", "out.safetensors"),
    "resize": ("--rank", "1", "--out", "out.safetensors"),
    "merge": ("--out", "out.safetensors"),
    "verify": ("--base", "tiny"),
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_commands_refuse_the_file_and_with_the_choice_do_as_without_its_text_part(
    verb: str, file: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(file.parent)
    with pytest.raises(AdapterError, match="leave them out with --transformer-only"):
        command("lora", verb, file, *COMMANDS[verb])
    assert not Path("out.safetensors").exists()
    command("lora", verb, file, *COMMANDS[verb], "--transformer-only")
    printed = capsys.readouterr().out
    assert f"note: {file}: {LEFT_OUT}" in printed
    command("lora", verb, "part.safetensors", *(word.replace("out.", "expected.") for word in COMMANDS[verb]))
    if verb == "verify":
        expected = capsys.readouterr().out.replace("part.safetensors", str(file))
        assert [line for line in printed.splitlines() if not line.startswith("note")] == expected.splitlines()
    else:
        found, expected = load_file("out.safetensors"), load_file("expected.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_base_is_merged_with_the_transformer_part(file: Path) -> None:
    folders = []
    for name, extra in (("both", ["--transformer-only"]), ("part", [])):
        folders.append(file.parent / f"base-{name}")
        command("lora", "merge", file.parent / f"{name}.safetensors", "--into-base", "--base", "tiny", "--out",
                folders[-1], *extra)  # fmt: skip
    one, other = (load_transformer(resolve_base(str(folder)), torch.float32).state_dict() for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_pictures_are_drawn_with_the_transformer_part_and_again_from_their_recipe(
    file: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(file.parent)
    asked = ("infer", "--base", "tiny", "--prompt", "a dog", "--size", "64", "--steps", "1", "--no-before")
    with pytest.raises(AdapterError, match="leave them out with --transformer-only"):
        command(*asked, "--lora", file)
    assert not Path("images").exists()
    command(*asked, "--lora", file, "--transformer-only", "--out", "one")
    assert f"note: {file}: {LEFT_OUT}" in capsys.readouterr().out
    command(*asked, "--lora", "part.safetensors", "--out", "two")
    command("infer", "--from", "one/a-dog-seed0.png", "--out", "three")
    one, two, three = (Image.open(f"{folder}/a-dog-seed0.png").tobytes() for folder in ("one", "two", "three"))
    assert one == two == three


def test_a_run_starts_from_what_convert_writes(quick_config, file: Path) -> None:
    ways: list[LoraMethod] = []
    for start in (file, file.parent / "converted.safetensors"):
        overrides = (f"method={{kind: lora, rank: 2, alpha: 2, start_from: {start}}}",)
        ways.append(LoraMethod(quick_config(file.parent / "run", *overrides)))
    refused, fine = ways
    with pytest.raises(AdapterError) as caught:
        refused.select(empty_transformer(resolve_base("tiny")))
    (line,) = caught.value.problems
    assert line.startswith(f"method.start_from: {file}: ")
    converting = line.partition("`sd3tune ")[2].partition("`")[0].replace("NEW", str(file.parent / "converted"))
    command(*converting.split())
    assert fine.select(empty_transformer(resolve_base("tiny")))


def test_nothing_is_said_of_a_file_without_a_text_part(file: Path) -> None:
    part = file.parent / "part.safetensors"
    assert read_adapter(part, transformer_only=True).notes == read_adapter(part).notes == ()

"""The model card: what the Hub reads, what people copy, and no path of the machine it was made on."""

from __future__ import annotations

import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageChops

from sd3tune.config import Config
from sd3tune.jobs.conditions import Request
from sd3tune.jobs.infer import run_infer
from sd3tune.jobs.train import run_training
from sd3tune.model.adapter_io import read_adapter
from sd3tune.model.bases import resolve_base
from sd3tune.publish.card import card

REPORT = {
    "velocity_change": 0.0173,
    "fixed_noise_loss": {"sigma": [0.2, 0.8], "base": [3.25, 3.0], "trained": [3.125, 2.5]},
}


@pytest.fixture(scope="module")
def run(quick_config, tiny_images: Path, tmp_path_factory) -> Path:
    """A finished run on a local folder, one caption for all, T5 off."""
    root = tmp_path_factory.mktemp("cards")
    base = shutil.copytree(resolve_base("tiny").path, root / "my-sd3")
    photos = root / "photos"
    photos.mkdir()
    shutil.copy(tiny_images / "0.png", photos)
    source = f"data.sources=[{{path: {photos}, caption: a photo of sks dog}}]"
    run_training(
        quick_config(root / "run", f"model.base={base}", "model.t5=false", source, "train.steps=2", "method.alpha=3.0")
    )
    return root / "run"


@pytest.fixture(scope="module")
def contract(run: Path) -> dict[str, Any]:
    return read_adapter(run).contract


@pytest.fixture
def config(quick_config, tmp_path: Path) -> Config:
    return quick_config(tmp_path / "run", "train.batch_size=2", "train.gradient_accumulation=4")


def header(text: str) -> dict[str, Any]:
    start, raw, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(raw)


def block(text: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return found


def test_a_run_ends_with_a_card_that_names_its_prompt(run: Path) -> None:
    text = (run / "README.md").read_text(encoding="utf-8")
    assert header(text) == {
        "library_name": "diffusers",
        "tags": ["lora", "sd3tune", "text-to-image", "diffusers"],
        "instance_prompt": "a photo of sks dog",
    }
    assert "Prompt it with `a photo of sks dog`." in text
    assert "A LoRA adapter for my-sd3, trained with sd3tune." in text


def test_no_path_of_the_machine_is_in_it(run: Path) -> None:
    text = (run / "README.md").read_text(encoding="utf-8")
    for folder in {run, *run.parents, Path.home(), Path.cwd()} - {Path("/")}:
        assert f"{folder}/" not in text.replace("path/to/", "")


def test_the_snippet_draws_what_infer_draws(run: Path, tmp_path: Path, monkeypatch) -> None:
    """Run as it stands, but for the folder's place and a machine without a GPU."""
    code = block((run / "README.md").read_text(encoding="utf-8"), "python")
    assert "max_sequence_length=16" in code
    for ours, theirs in ((f"{run.parent}/my-sd3", "path/to/my-sd3"), ("float32", "bfloat16"), ('"cpu"', '"cuda"')):
        assert theirs in code
        code = code.replace(theirs, ours)
    monkeypatch.chdir(run)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # diffusers' way of calling an argument deprecated
        exec(compile(code, "card", "exec"), {})
    drawn = Image.open(run / "image.png")

    words = shlex.split(block((run / "README.md").read_text(encoding="utf-8"), "bash"))
    assert words == ["sd3tune", "infer", "--lora", ".", "--prompt", "a photo of sks dog"]
    (path,) = run_infer(Request([words[3]], words[5], tmp_path, before=False))
    assert drawn.size == (64, 64)
    assert ImageChops.difference(drawn, Image.open(path)).getbbox() is None


def test_a_hub_base_is_linked(config: Config, contract: dict[str, Any]) -> None:
    name = "stabilityai/stable-diffusion-3.5-medium"
    on_hub = {**contract, "base": name, "base_kind": "hub", "base_revision": "b940f670f0eda2d07fbb75229e779da1ad11eb80"}
    text = card(config, {**on_hub, "encoders": ["clip_l", "clip_g", "t5"]}, REPORT)
    assert header(text)["base_model"] == name
    assert header(text)["base_model_relation"] == "adapter"
    assert header(text)["pipeline_tag"] == "text-to-image"
    assert f"from_pretrained('{name}', dtype=torch.bfloat16).to" in text
    assert f"| base model | {name} at b940f670f0eda2d07fbb75229e779da1ad11eb80 |" in text


@pytest.mark.parametrize("kind", ["tiny", "folder"])
def test_a_base_that_is_not_on_the_hub_is_not_linked(kind: str, config: Config, contract: dict[str, Any]) -> None:
    assert "base_model" not in header(card(config, {**contract, "base_kind": kind}, REPORT))


def test_it_states_how_it_was_made_and_what_was_measured(config: Config, contract: dict[str, Any]) -> None:
    text = card(config, {**contract, "weights": "ema"}, REPORT)
    for row in (
        "| rank, alpha | 2, 3 (folded into the file: alpha = rank there) |",
        "| steps | 3, batch 2 x 4 |",
        "| optimizer | adamw, learning rate 0.01, constant |",
        "| sigma | logit_normal (mean 0, std 1), shift 1, weighting none |",
        "| resolution | 64 px, aspect buckets |",
        "| T5 tokens | 16, T5 not used |",
        "| weights | exponential moving average |",
        "| 0.2 | 3.2500 | 3.1250 |",
        "| 0.8 | 3.0000 | 2.5000 |",
        "One denoising step changes by 1.73 %.",
    ):
        assert row in text.splitlines(), row


@pytest.mark.parametrize(
    "prompt", ['it\'s "his" $HOME `dog`: yes', "a\nb", "- a: b # c", "日本の犬", "x " * 99, "{base}"]
)
def test_any_prompt_survives_yaml_shell_and_python(prompt: str, config: Config, contract: dict[str, Any]) -> None:
    text = card(config, {**contract, "instance_prompt": prompt}, REPORT)
    assert header(text)["instance_prompt"] == prompt
    assert shlex.split(block(text, "bash"))[-1] == prompt
    assert f"pipe({prompt!r}, " in block(text, "python")
    compile(block(text, "python"), "card", "exec")


def test_captions_that_differ_make_no_instance_prompt(config: Config, contract: dict[str, Any]) -> None:
    text = card(config, {**contract, "instance_prompt": None}, REPORT)
    assert "instance_prompt" not in header(text)
    assert "Prompt it with" not in text


def test_prior_preservation_and_held_out_loss_are_stated(
    config: Config, contract, quick_config, tmp_path: Path
) -> None:
    assert "prior preservation" not in card(config, contract, REPORT)
    assert "not trained on" not in card(config, contract, REPORT)
    kept = quick_config(tmp_path, "data.sources.0.prior={prompt: a photo of a dog, weight: 0.5}")
    last = {"step": 800, "images": 4, "loss": 0.75, "base_loss": 1.0}
    measured = {"last": last, "best": {**last, "step": 600, "loss": 0.7}}
    text = card(kept, contract, {**REPORT, "held_out": measured})
    assert "| prior preservation | class images of `a photo of a dog`, weight 0.5 |" in text
    assert (
        "On 4 images that were not trained on, the mean loss over all noise levels is 0.7500, and 0.7000 at step 600; "
        "without the adapter it is 1.0000." in text
    )

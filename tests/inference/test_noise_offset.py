"""A noise offset of the training is also in the starting noise: previews, `infer`, replays, held-out loss, the card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.infer import run_infer
from sd3tune.commands.lora_verify import verify_lora
from sd3tune.commands.train import run_training
from sd3tune.errors import ConfigError
from sd3tune.inference.image_folder import before_and_after
from sd3tune.inference.image_request import ImageRequest
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.recipes import read_recipe
from sd3tune.model.base.resolve import resolve_base
from sd3tune.run.preflight import make_plan
from sd3tune.run.priors import plan_priors

SETTINGS = (
    "flow.noise_offset=0.5", "train.steps=4", "checkpoint={every: 2, keep: 9}", "validation={holdout: 1, every: 2}",
    "preview={every: 2, prompts: [a dog], steps: 2, guidance: 3.0, seed: 4}",
)  # fmt: skip
DRAWING: dict[str, Any] = {"prompt": "a dog", "seed": 4, "steps": 2, "guidance": 3.0}
SAID = "warning: flow.noise_offset: sd3tune's pictures start from the same offset; other tools start without it"


def same(one: Path, other: Path) -> bool:
    return ImageChops.difference(Image.open(one), Image.open(other)).getbbox() is None


def adapter_file(run: Path) -> Path:
    return run / "adapter" / "pytorch_lora_weights.safetensors"


def as_of_before(contract: dict[str, Any]) -> None:
    """What commit 3cdfac5 wrote: the training's offset, and nothing of the sampler's."""
    del contract["sampler_noise_offset"]


@pytest.fixture(scope="module")
def finished(quick_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "offset"
    run_training(quick_config(run, *SETTINGS))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_infer_starts_as_the_previews_did_and_the_base_as_the_base_does(finished: Path, tmp_path: Path) -> None:
    contract = read_adapter(finished).contract
    assert (contract["noise_offset"], contract["sampler_noise_offset"]) == (0.5, 0.5)
    drawn, sheet = run_infer(InferenceJob.from_fields(loras=[str(finished)], out=tmp_path / "with", **DRAWING))
    assert same(drawn, finished / "samples" / "step-000004-0.png")
    (plain,) = run_infer(
        InferenceJob.from_fields(
            loras=[str(finished)], out=tmp_path / "plain", noise_offset=0.0, before=False, **DRAWING
        )
    )
    assert not same(plain, drawn)
    (base,) = run_infer(
        InferenceJob.from_fields(loras=[], base="tiny", out=tmp_path / "base", size=(64, 64), t5_tokens=16, **DRAWING)
    )
    assert same(base, finished / "samples" / "base-0.png")
    expected = before_and_after([Image.open(base)], [Image.open(drawn)], [ImageRequest(**DRAWING)])
    assert Image.open(sheet).tobytes() == expected.tobytes()


def test_diffusers_draws_it_too_with_the_code_of_the_card(finished: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    card = (finished / "README.md").read_text()
    assert "trained with noise offset 0.5, and sampling must start from it" in card
    assert "then 24 % of the trained spread of brightness is drawn at 64 px" in card
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").symlink_to(finished / "adapter")
    exec(compile(card.split("```python\n")[1].split("```")[0], "card", "exec"), {})
    assert same(tmp_path / "image.png", finished / "samples" / "step-000004-0.png")
    assert verify_lora(finished, None, "auto")[-1].endswith("drawn again by diffusers: equal to the pixel")


def test_a_run_says_what_an_offset_means_and_one_without_says_nothing(quick_config, tmp_path: Path, capsys) -> None:
    run_training(quick_config(tmp_path / "with", "flow.noise_offset=0.05", "data.resolution=1024"), dry_run=True)
    assert f"{SAID} and then draw 15 % of the spread of brightness at 1024 px" in capsys.readouterr().out
    run_training(quick_config(tmp_path / "without"), dry_run=True)
    assert "noise_offset" not in capsys.readouterr().out


@pytest.mark.long
def test_a_recipe_carries_the_offset_and_one_of_before_has_none(run: Path, tmp_path: Path, edit_json) -> None:
    (drawn,) = run_infer(InferenceJob.from_fields(loras=[str(run)], out=run / "images", before=False, **DRAWING))
    recipe = read_recipe(drawn)
    assert recipe is not None
    assert recipe["noise_offset"] == 0.5
    again = InferenceJob.from_fields(loras=[str(run)], prompt=None, from_picture=drawn, out=tmp_path / "again")
    assert same(run_infer(again)[0], drawn)

    (plain,) = run_infer(
        InferenceJob.from_fields(loras=[str(run)], out=tmp_path / "plain", noise_offset=0.0, before=False, **DRAWING)
    )
    assert "noise_offset" not in (read_recipe(plain) or {})
    again = InferenceJob.from_fields(loras=[str(run)], prompt=None, from_picture=plain, out=tmp_path / "plain-again")
    assert same(run_infer(again)[0], plain)
    edit_json(plain, lambda recipe: recipe.update(noise_offset="much"))
    with pytest.raises(ConfigError, match=r"noise_offset: Input should be a valid number, not \"much\""):
        run_infer(again)


@pytest.mark.long
def test_an_adapter_of_before_is_drawn_as_then_and_says_how_it_would_be_right(
    run: Path, tmp_path: Path, capsys, edit_json
) -> None:
    (right,) = run_infer(InferenceJob.from_fields(loras=[str(run)], out=tmp_path / "right", before=False, **DRAWING))
    (plain,) = run_infer(
        InferenceJob.from_fields(loras=[str(run)], out=tmp_path / "plain", noise_offset=0.0, before=False, **DRAWING)
    )
    assert "warning" not in capsys.readouterr().out
    edit_json(adapter_file(run), as_of_before)
    (found,) = run_infer(InferenceJob.from_fields(loras=[str(run)], out=tmp_path / "found", before=False, **DRAWING))
    assert same(found, plain)
    assert (
        "was trained with noise offset 0.5, by an earlier sd3tune that drew without it; --noise-offset 0.5 draws"
        in (capsys.readouterr().out)
    )
    (found,) = run_infer(
        InferenceJob.from_fields(loras=[str(run)], out=tmp_path / "told", noise_offset=0.5, before=False, **DRAWING)
    )
    assert same(found, right)
    assert "warning" not in capsys.readouterr().out


def test_a_file_of_prompts_has_a_column_for_it(finished: Path, tmp_path: Path) -> None:
    lines = ({"prompt": "a dog"}, {"prompt": "a dog", "noise_offset": 0, "name": "plain"})
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = {name: value for name, value in DRAWING.items() if name != "prompt"}
    request = InferenceJob.from_fields(
        loras=[str(finished)], prompt=None, out=tmp_path / "out", prompts=tmp_path / "x.jsonl", **told
    )
    first, second = run_infer(request)
    assert same(first, finished / "samples" / "step-000004-0.png")
    assert not same(first, second)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a dog", "noise_offset": 2}')
    with pytest.raises(ConfigError, match=r"x\.jsonl:1: noise_offset 2: from 0 to 1; 0 is none"):
        run_infer(request)
    with pytest.raises(ConfigError, match=r"--noise-offset -0\.1: from 0 to 1; 0 is none"):
        run_infer(InferenceJob.from_fields(loras=[str(finished)], out=tmp_path / "out", noise_offset=-0.1, **DRAWING))


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


def test_held_out_loss_is_measured_on_offset_noise_and_goes_on_as_it_began(
    quick_config, finished: Path, tmp_path: Path, adapter_of
) -> None:
    offset = lines_of(finished)
    assert [line["noise_offset"] for line in offset] == [0.5] * 3
    plain = tmp_path / "plain"
    run_training(quick_config(plain, *SETTINGS[1:], "preview.prompts=[]"))
    without = lines_of(plain)
    assert "noise_offset" not in without[0]
    assert offset[0]["loss"] != without[0]["loss"]

    run = Path(shutil.copytree(finished, tmp_path / "run"))  # as if 3cdfac5 had stopped after the step 2
    for line in ("README.md", "adapter", "checkpoints/step-000004"):
        path = run / line
        path.unlink() if path.is_file() else shutil.rmtree(path)
    (run / "validation.jsonl").write_text(json.dumps({**without[0]}) + "\n" + json.dumps({**without[1]}) + "\n")
    run_training(quick_config(run, *SETTINGS), resume=True)
    found, expected = adapter_of(run), adapter_of(finished)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    resumed = lines_of(run)
    assert all("noise_offset" not in line for line in resumed)
    assert resumed[2]["base_loss"] == without[0]["base_loss"]


@pytest.mark.long
def test_class_images_start_as_the_base_was_trained(quick_config, tmp_path: Path, edit_json) -> None:
    """A base whose contract says so draws others, under other names; `infer` draws with it alone in the same way."""
    base = Path(shutil.copytree(resolve_base("tiny").path, tmp_path / "base"))
    contract = {"base": "tiny", "max_sequence_length": 16, "encoders": ["clip_l", "clip_g", "t5"], "resolution": 64}
    prior = "data.sources.0.prior={prompt: a dog, images: 3, steps: 2, guidance: 3.0}"
    names, pictures = [], []
    for number, of_the_sampler in enumerate(({}, {"sampler_noise_offset": 0.5})):
        (base / "sd3tune.json").write_text(json.dumps({**contract, "noise_offset": 0.5, **of_the_sampler}))
        config = quick_config(
            tmp_path / str(number), f"model.base={base}", prior, "train.steps=1", "data.buckets=false"
        )
        run_training(config)
        plan = make_plan(config, torch.device("cpu"), resume=None)
        (planned,) = plan_priors(plan.config, plan.records, plan.buckets, plan.base)
        names.append({drawn.path.name for drawn in planned.drawn})
        first = planned.drawn[0]
        request = InferenceJob.from_fields(
            loras=[], base=str(base), out=tmp_path / f"out-{number}", **{**DRAWING, "seed": first.seed}
        )
        pictures.append(run_infer(request)[0])
        assert same(first.path, pictures[-1])
    assert not names[0] & names[1]
    assert not same(*pictures)


def test_training_without_the_offset_of_the_base_is_warned_about(quick_config, tmp_path: Path, capsys) -> None:
    base = Path(shutil.copytree(resolve_base("tiny").path, tmp_path / "base"))
    (base / "sd3tune.json").write_text(json.dumps({"sampler_noise_offset": 0.05, "noise_offset": 0.05}))
    run_training(quick_config(tmp_path / "run", f"model.base={base}"), dry_run=True)
    said = "warning: base was trained with noise offset 0.05 and flow.noise_offset is 0; set it to 0.05"
    assert said in capsys.readouterr().out
    run_training(quick_config(tmp_path / "run", f"model.base={base}", "flow.noise_offset=0.05"), dry_run=True)
    assert "was trained with noise offset" not in capsys.readouterr().out

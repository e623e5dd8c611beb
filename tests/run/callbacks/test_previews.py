"""Previews are what `infer` draws from the checkpoint of that step, and the run does not notice them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.errors import ConfigError, RunError, UserError
from sd3tune.inference.job import InferenceJob
from sd3tune.model.base.resolve import resolve_base
from sd3tune.publish.previews import preview_recipe
from sd3tune.run.verify_preview import compare_with_preview
from sd3tune.training.loop import View

PROMPTS = ["a photo of sks dog", "a cat on a boat"]
SETTINGS = "preview={every: 2, prompts: [a photo of sks dog, a cat on a boat], steps: 2, guidance: 4.0, seed: 11}"
UNSEEN = "preview={steps: 2, guidance: 4.0}"
"""The same settings, which the adapter states whether or not anything is drawn."""
# The average and a scale that is no power of two: what is drawn must be what is exported, to the last bit.
OPTIONS = ("train.steps=5", "checkpoint={every: 2, keep: 9}", "ema={decay: 0.5}", "method.alpha=3.0")


@pytest.fixture(scope="module")
def run(quick_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "previewed"
    run_training(quick_config(run, *OPTIONS, SETTINGS))
    return run


def preview(run: Path, step: int, number: int) -> Image.Image:
    return Image.open(run / "samples" / f"step-{step:06d}-{number}.png")


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


@pytest.mark.parametrize("step", [2, 4, 5])
@pytest.mark.parametrize("number", [0, 1])
def test_a_preview_is_what_infer_draws_from_the_checkpoint(run: Path, step: int, number: int, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / f"step-{step:06d}"
    assert read_adapter(checkpoint).contract["weights"] == "ema"
    (path,) = run_infer(
        InferenceJob.from_fields(
            loras=[str(checkpoint)],
            prompt=PROMPTS[number],
            out=tmp_path,
            seed=11 + number,
            steps=2,
            guidance=4.0,
            before=False,
        )
    )
    assert same(preview(run, step, number), Image.open(path))


def test_the_base_is_drawn_beside_and_is_the_preview_before_the_first_step(run: Path, tmp_path: Path) -> None:
    request = InferenceJob.from_fields(
        loras=[f"{run}@0"], prompt=PROMPTS[0], out=tmp_path, seed=11, steps=2, guidance=4.0, before=False
    )
    base = Image.open(run / "samples" / "base-0.png")
    assert same(base, Image.open(run_infer(request)[0]))
    assert same(base, preview(run, 0, 0))


def test_previews_come_before_the_first_step_every_so_often_and_after_the_last(run: Path) -> None:
    names = {path.name for path in (run / "samples").iterdir()}
    columns = ("base", *(f"step-{step:06d}" for step in (0, 2, 4, 5)))
    assert names == {"over_time.png", *(f"{name}-{number}.png" for name in columns for number in (0, 1))}
    images = [preview(run, step, 0) for step in (0, 2, 4, 5)]
    assert not any(same(one, other) for number, one in enumerate(images) for other in images[:number])


def test_the_sheet_has_a_column_for_the_base_and_each_step_and_a_row_a_prompt(run: Path) -> None:
    sheet = Image.open(run / "samples" / "over_time.png")
    assert sheet.size == (8 + 5 * (256 + 8), 28 + 2 * (28 + 256 + 8))
    for column, name in enumerate(("base", *(f"step-{step:06d}" for step in (0, 2, 4, 5)))):
        for row in (0, 1):
            left, top = 8 + column * 264, 28 + row * 292 + 28
            picture = Image.open(run / "samples" / f"{name}-{row}.png")
            expected = picture.resize((256, 256), Image.Resampling.NEAREST)
            assert same(sheet.crop((left, top, left + 256, top + 256)), expected)


def test_the_run_does_not_notice_its_previews(run: Path, quick_config, tmp_path: Path, assert_equal_runs) -> None:
    run_training(quick_config(tmp_path / "plain", *OPTIONS, UNSEEN))
    assert not (tmp_path / "plain" / "samples").exists()
    assert_equal_runs(tmp_path / "plain", run)


def test_previews_leave_an_fp16_run_and_its_loss_scale_alone(quick_config, tmp_path: Path, assert_equal_runs) -> None:
    options = ("model.dtype=fp16", "train.steps=3", "ema={decay: 0.5}", "checkpoint.every=1")
    run_training(quick_config(tmp_path / "plain", *options, UNSEEN))
    run_training(quick_config(tmp_path / "run", *options, SETTINGS.replace("every: 2", "every: 1")))
    assert (tmp_path / "run" / "samples").exists()
    assert_equal_runs(tmp_path / "plain", tmp_path / "run")


def test_the_live_weights_are_the_very_same_tensors_afterwards(quick_config, tmp_path: Path) -> None:
    seen: list[tuple[list[int], list[torch.Tensor]]] = []

    def watch(view: View) -> None:  # called after the preview of the same step
        trained = [parameter for parameter in view.transformer.parameters() if parameter.requires_grad]
        seen.append(([parameter.data_ptr() for parameter in trained], [parameter.clone() for parameter in trained]))

    options = [SETTINGS.replace("every: 2", "every: 1"), "ema={decay: 0.9}", "method.alpha=3.0", "train.steps=2"]
    run_training(quick_config(tmp_path / "run", *options), callbacks=[watch])
    assert seen[0][0] == seen[1][0] == seen[2][0]
    raw = load_file(tmp_path / "run" / "adapter_raw" / "pytorch_lora_weights.safetensors")
    live = torch.cat([parameter.flatten() for parameter in seen[-1][1]])
    assert live.norm().item() == pytest.approx(
        sum((v / (1.5 if "lora_B" in k else 1.0)).norm().item() ** 2 for k, v in raw.items()) ** 0.5, rel=1e-5
    )


@pytest.fixture
def stopped(quick_config, tmp_path: Path) -> Path:
    """A run that was stopped after step 2, of which a checkpoint and all previews so far are left."""

    def stop(view: View) -> None:
        if view.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(RunError, match="stopped, saved at step-000002"):
        run_training(quick_config(tmp_path / "run", *OPTIONS, SETTINGS), callbacks=[stop])
    return tmp_path / "run"


@pytest.mark.parametrize("lost", [False, True])
def test_a_resumed_run_keeps_earlier_previews_and_draws_what_is_missing(
    lost: bool, stopped: Path, run: Path, quick_config
) -> None:
    one, other = (stopped / "samples" / f"step-000002-{number}.png" for number in (0, 1))
    at = one.stat().st_mtime_ns
    if lost:  # as if stopped between two pictures
        other.unlink()
    run_training(quick_config(stopped, *OPTIONS, SETTINGS), resume=True)
    assert (one.stat().st_mtime_ns == at) is not lost
    for step in (0, 2, 4, 5):
        assert all(same(preview(stopped, step, number), preview(run, step, number)) for number in (0, 1))
    assert same(Image.open(stopped / "samples" / "over_time.png"), Image.open(run / "samples" / "over_time.png"))


def test_a_prompt_added_while_resuming_has_no_early_pictures(stopped: Path, quick_config) -> None:
    more = SETTINGS.replace("a cat on a boat", "a cat on a boat, a horse")
    run_training(quick_config(stopped, *OPTIONS, more), resume=True)
    assert not (stopped / "samples" / "step-000000-2.png").exists()
    sheet = Image.open(stopped / "samples" / "over_time.png")
    assert sheet.size == (8 + 5 * (256 + 8), 28 + 3 * (28 + 256 + 8))
    assert blank(sheet, column=1, row=2)
    assert not any(blank(sheet, column, row) for column, row in ((0, 2), (1, 1), (3, 2)))


def test_pictures_of_other_prompts_or_settings_are_not_taken_for_these(stopped: Path, quick_config, run: Path) -> None:
    before = preview(stopped, 2, 1).copy()
    other = SETTINGS.replace("a cat on a boat", "a horse").replace("every: 2", "every: 1")
    run_training(quick_config(stopped, *OPTIONS, other), resume=True)
    assert same(preview(stopped, 2, 0), preview(run, 2, 0))
    assert not same(preview(stopped, 2, 1), before)
    sheet = Image.open(stopped / "samples" / "over_time.png")
    assert blank(sheet, column=1, row=1)  # step 0, of which there is a cat and no horse
    assert not any(blank(sheet, column, 1) for column in (0, 2, 3, 4, 5))


def blank(sheet: Image.Image, column: int, row: int) -> bool:
    left, top = 8 + column * 264, 28 + row * 292 + 28
    return sheet.crop((left, top, left + 256, top + 256)).getcolors() == [(256 * 256, (255, 255, 255))]


GUIDED = (
    "preview={every: 2, steps: 4, guidance: 4.0, seed: 11, prompts: [{prompt: a red circle, negative: a cross, "
    "size: 96x64, slg: 2.8, slg_layers: [1, 2], slg_stop: 0.6}, a cat on a boat]}"
)


@pytest.fixture(scope="module")
def guided(quick_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "guided"
    run_training(quick_config(run, "train.steps=2", GUIDED))
    return run


def test_a_prompt_with_settings_of_its_own_is_what_infer_draws_with_them(guided: Path, tmp_path: Path) -> None:
    common = {"loras": [str(guided)], "prompt": "a red circle", "out": tmp_path, "seed": 11, "before": False}
    own = {"negative": "a cross", "size": "96x64", "slg": 2.8, "slg_layers": "1,2", "slg_stop": 0.6}
    (path,) = run_infer(InferenceJob.from_fields(**common, **own))
    drawn = preview(guided, 2, 0)
    assert drawn.size == (96, 64)
    assert same(drawn, Image.open(path))
    assert preview(guided, 2, 1).size == (64, 64)
    for left_out in ("negative", "slg"):
        rest = {name: value for name, value in own.items() if not name.startswith(left_out)}
        (path,) = run_infer(InferenceJob.from_fields(**common, **rest))
        assert not same(drawn, Image.open(path))


def test_its_settings_are_kept_in_recipe_configuration_card_and_command(guided: Path) -> None:
    recipe = preview_recipe(guided / "samples" / "step-000002-0.png")
    assert recipe is not None
    slg = {"scale": 2.8, "layers": [1, 2], "start": 0.01, "stop": 0.6}
    assert (recipe["negative"], recipe["size"], recipe["slg"]) == ("a cross", [96, 64], slg)
    plain = preview_recipe(guided / "samples" / "step-000002-1.png")
    assert plain is not None
    assert not {"negative", "size", "slg"} & plain.keys()
    assert load_config(guided / "config.yaml").config.preview.pictures[0].sides == (96, 64)
    card = (guided / "README.md").read_text()
    options = "--negative 'a cross' --size 96x64 --slg 2.8 --slg-layers 1,2 --slg-start 0.01 --slg-stop 0.6"
    assert options in card
    for line in ("width=96,", "height=64,", 'negative_prompt="a cross",', "skip_guidance_layers=[1, 2],"):
        assert line in card


def test_lora_verify_draws_it_again_with_diffusers(guided: Path) -> None:
    adapter = read_adapter(guided)
    line = compare_with_preview(adapter, resolve_base("tiny"), "auto", torch.device("cpu"))
    assert line.endswith("drawn again by diffusers: equal to the pixel")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("{prompt: a, size: 100}", "preview.prompts.0.size: 100 is no side such as 1024, or WIDTHxHEIGHT"),
        ("{prompt: a, size: 64 x 64}", "preview.prompts.0.size: '64 x 64' is no side such as 1024"),
        ("{size: 64}", "preview.prompts.0.prompt: missing"),
        ("{prompt: a, sizes: 64}", "preview.prompts.0.sizes: unknown key; did you mean 'size'?"),
        ("{prompt: a, slg: 1.0, slg_start: 0.5}", "slg_start 0.5 must be below slg_stop 0.2"),
        ("5", "preview.prompts.0: 5 is neither text nor a section of keys"),
    ],
)
def test_a_wrong_entry_is_one_line(quick_config, tmp_path: Path, entry: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        quick_config(tmp_path, f"preview.prompts=[{entry}]")
    (line,) = caught.value.problems
    assert problem in line


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("{prompt: a, size: 4096}", "preview.prompts.0.size: 4096 is too large for this base; at most"),
        ("{prompt: a, slg: 2.8}", "preview.prompts.0.slg_layers: 7, 8, 9: this base has the blocks 0 to 3"),
    ],
)
def test_what_this_base_cannot_draw_is_refused_first(quick_config, tmp_path: Path, entry: str, problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        run_training(quick_config(tmp_path / "run", f"preview.prompts=[{entry}]"))
    assert not (tmp_path / "run" / "samples").exists()

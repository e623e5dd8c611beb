"""`infer`: images from adapters, drawn as they were trained, with their recipe inside."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd3tune import __version__
from sd3tune.adapter.file import ADAPTER_FILE, read_adapter, write_adapter
from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.errors import AdapterError, ConfigError, ModelError, RunError, UserError
from sd3tune.files.tensors import tensors_sha256
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.lora_argument import parse_lora
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_pipeline
from sd3tune.sampling.contact_sheet import contact_sheet
from tests.pictures import distance, opened

PROMPT = "a photo of sks dog"
Draw = Callable[..., list[Path]]


@pytest.fixture(scope="module")
def run(quick_config, tmp_path_factory) -> Path:
    """A run trained at 77 T5 tokens, its alpha / rank no power of two."""
    run = tmp_path_factory.mktemp("runs") / "dog"
    run_training(quick_config(run, "model.max_sequence_length=77", "method.alpha=3.0"))
    return run


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """`draw("path@0.5", ..., num=2)`: the files, without the picture of before and after unless asked for."""

    def draw(*loras: object, **options) -> list[Path]:
        given = {"prompt": PROMPT, "out": tmp_path / "images", "steps": 2, "guidance": 4.0, "before": False, **options}
        return run_infer(InferenceJob.from_fields(loras=[str(lora) for lora in loras], **given))

    return draw


def recipe_of(path: Path) -> dict:
    return json.loads(opened(path).text["sd3tune"])


def copy_of(run: Path, folder: Path, b: float = 1.0, **contract: object) -> Path:
    """The adapter alone in another folder, its B multiplied by `b`, keys of its contract replaced (None: removed)."""
    adapter = read_adapter(run)
    factors = {}
    for name, (down, up) in adapter.factors.items():
        factors[f"{name}.lora_A"], factors[f"{name}.lora_B"] = down, b * up
    merged = {**adapter.contract, **contract}
    write_adapter(folder, factors, {key: value for key, value in merged.items() if value is not None})
    return folder


def pipeline_image(pipeline: StableDiffusion3Pipeline, length: int, seed: int, **options) -> Image.Image:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=4.0,
        max_sequence_length=length,
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).images[0]


# Conditions.


def test_base_t5_length_and_size_come_from_the_adapter(run: Path, draw: Draw) -> None:
    """Image for image what a plain pipeline draws with the adapter and the T5 length of the training."""
    pipeline = load_pipeline(resolve_base("tiny"), torch.float32)
    without = pipeline_image(pipeline, 77, 5)
    pipeline.load_lora_weights(run / "adapter")
    images = [opened(path) for path in draw(run, seed=5, num=2)]
    assert distance(images[0], pipeline_image(pipeline, 77, 5)) == 0
    assert distance(images[1], pipeline_image(pipeline, 77, 6)) == 0
    assert distance(images[0], pipeline_image(pipeline, 256, 5)) > 8
    assert distance(images[0], without) > 8


def test_an_adapter_trained_without_t5_is_drawn_without_t5(run: Path, draw: Draw, tmp_path: Path) -> None:
    (path,) = draw(copy_of(run, tmp_path / "no-t5", encoders=["clip_l", "clip_g"]))
    pipeline = load_pipeline(resolve_base("tiny"), torch.float32, t5=False)
    pipeline.load_lora_weights(run / "adapter")
    assert distance(opened(path), pipeline_image(pipeline, 77, 0)) == 0
    assert recipe_of(path)["encoders"] == ["clip_l", "clip_g"]


def test_an_image_does_not_depend_on_its_neighbours(run: Path, draw: Draw) -> None:
    together = draw(run, seed=3, num=2)
    alone = draw(run, seed=4)
    assert distance(opened(together[1]), opened(alone[0])) == 0
    assert distance(opened(together[0]), opened(together[1])) > 8


@pytest.mark.parametrize("where", ["adapter", f"adapter/{ADAPTER_FILE}", "checkpoints/step-000003"])
def test_a_run_its_parts_and_its_checkpoints_can_be_given(where: str, run: Path, draw: Draw) -> None:
    assert distance(opened(*draw(run / where, steps=1)), opened(*draw(run, steps=1))) == 0


def test_size_negative_prompt_and_guidance_change_the_image(run: Path, draw: Draw) -> None:
    (plain,) = draw(run)
    (negative,) = draw(run, negative="a cat")
    pipeline = load_pipeline(resolve_base("tiny"), torch.float32)
    pipeline.load_lora_weights(run / "adapter")
    assert distance(opened(negative), pipeline_image(pipeline, 77, 0, negative_prompt="a cat")) == 0
    assert distance(opened(negative), opened(plain)) > 8
    assert opened(*draw(run, size=(96, 48), steps=1)).size == (96, 48)
    assert distance(opened(*draw(run, guidance=1.0)), opened(plain)) > 8


def test_a_prompt_that_is_too_long_is_named(run: Path, draw: Draw, capsys) -> None:
    """A negative one as well: each is told by its beginning."""
    draw(run, prompt="dog " * 90, negative="beach " * 80, steps=1)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: clip_l")]
    for warning, word, lost in zip(warnings, ("dog", "beach"), (90 - 75, 80 - 75), strict=True):
        said = rf"warning: clip_l reads 77 tokens; the last {lost} of '({word} )+\.\.\.' are cut off"
        assert re.fullmatch(said, warning)
    draw(run, steps=1)
    assert "warning" not in capsys.readouterr().out


def test_the_sampler_and_its_shift_are_used_and_recorded(run: Path, draw: Draw) -> None:
    (plain,) = draw(run, steps=3)
    (heun,) = draw(run, steps=3, sampler="heun")
    (shifted,) = draw(run, steps=3, shift=1.0)
    assert distance(opened(heun), opened(plain)) > 8
    assert distance(opened(shifted), opened(plain)) > 8
    assert (recipe_of(heun)["sampler"], recipe_of(shifted)["shift"]) == ("heun", 1.0)


def test_a_base_whose_shift_depends_on_the_size_is_drawn_by_euler_or_with_a_shift(draw: Draw, tmp_path: Path) -> None:
    base = shutil.copytree(resolve_base("tiny").path, tmp_path / "dynamic")
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dynamic_shifting": True}))
    options = {"base": str(base), "size": (64, 64)}
    with pytest.raises(ConfigError, match=r"^--sampler heun: the shift of dynamic depends on the size of the image"):
        draw(**options, sampler="heun")
    (own,), (given,) = draw(**options), draw(**options, sampler="heun", shift=2.0)
    assert (recipe_of(own)["shift"], recipe_of(given)["shift"]) == (None, 2.0)


# Weights.


def test_half_the_weight_is_half_the_delta(run: Path, draw: Draw, tmp_path: Path) -> None:
    half, whole = opened(*draw(f"{run}@0.5")), opened(*draw(run))
    assert distance(half, opened(*draw(copy_of(run, tmp_path / "half", b=0.5)))) == 0
    assert distance(half, whole) > 4


def test_two_adapters_add_up(run: Path, draw: Draw, tmp_path: Path) -> None:
    """One of weight 1 and one of weight -2 are the adapter of weight -1."""
    both = opened(*draw(run, f"{copy_of(run, tmp_path / 'twice', b=2.0)}@-1"))
    assert distance(both, opened(*draw(f"{run}@-1"))) <= 1
    assert distance(both, opened(*draw(run))) > 4


def test_weight_zero_is_the_base(run: Path, draw: Draw) -> None:
    pipeline = load_pipeline(resolve_base("tiny"), torch.float32)
    assert distance(opened(*draw(f"{run}@0")), pipeline_image(pipeline, 77, 0)) == 0


def test_the_base_can_be_drawn_alone(draw: Draw) -> None:
    pipeline = load_pipeline(resolve_base("tiny-sd3"), torch.float32)
    written = draw(base="tiny-sd3", size=(64, 64), before=True)
    assert len(written) == 1, "before and after would be the same"
    assert distance(opened(*written), pipeline_image(pipeline, 256, 0)) == 0
    assert recipe_of(written[0])["loras"] == []


def test_an_at_sign_in_a_path_is_no_weight(tmp_path: Path) -> None:
    folder = tmp_path / "me@2"
    folder.mkdir()
    assert parse_lora(str(folder)) == (folder, 1.0)
    assert parse_lora(f"{folder}@0.25") == (folder, 0.25)
    assert parse_lora("runs/dog@-1") == (Path("runs/dog"), -1.0)


# What is written.


def test_the_picture_of_before_and_after_shows_both(run: Path, draw: Draw) -> None:
    *after, sheet = draw(run, num=2, before=True)
    before = draw(f"{run}@0", num=2)
    assert len(after) == 2
    assert sheet.stem == "a-photo-of-sks-dog-seed0-before-after"
    labels = ["seed 0", "seed 1"], ["before: the base alone", "after: with the adapter"]
    expected = contact_sheet([[opened(path) for path in row] for row in (before, after)], *labels, side=128)
    assert distance(opened(sheet), expected) == 0


def test_each_image_holds_its_recipe(run: Path, draw: Draw, tmp_path: Path) -> None:
    other = copy_of(run, tmp_path / "runs" / "other" / "adapter")
    written = draw(run, f"{other}@0.5", negative="ein Hündchen", seed=7, num=2, before=True)
    for path, seed in zip(written, (7, 8, 7), strict=True):
        recipe = recipe_of(path)
        assert recipe.pop("sheet", None) == ("before-after" if path is written[-1] else None)
        assert recipe == {
            "sd3tune": __version__, "prompt": PROMPT, "negative": "ein Hündchen", "seed": seed, "steps": 2,
            "guidance": 4.0, "size": [64, 64], "sampler": "euler", "shift": 3.0, "base": "tiny",
            "base_revision": None,
            "base_fingerprint": resolve_base("tiny").fingerprint("transformer"), "max_sequence_length": 77,
            "encoders": ["clip_l", "clip_g", "t5"], "dtype": "fp32",
            "loras": [
                {"name": "dog", "weight": 1.0, **digests(run / "adapter" / ADAPTER_FILE)},
                {"name": "other", "weight": 0.5, **digests(other / ADAPTER_FILE)},
            ],
        }  # fmt: skip
        assert "/" not in json.dumps(recipe)
        assert str(tmp_path).encode() not in path.read_bytes()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(path: Path) -> dict[str, str]:
    return {"sha256": digest(path), "tensors_sha256": tensors_sha256(path)}


def test_earlier_images_are_never_overwritten(run: Path, draw: Draw) -> None:
    first = draw(run, steps=1, before=True)
    contents = [path.read_bytes() for path in first]
    second = draw(run, steps=1, before=True, negative="a cat")
    third = draw(run, steps=1, before=True)
    assert [path.name for path in second] == [f"{path.stem}-2.png" for path in first]
    assert [path.name for path in third] == [f"{path.stem}-3.png" for path in first]
    assert [path.read_bytes() for path in first] == contents


@pytest.mark.parametrize(("prompt", "stem"), [("日本", "image"), ("../../x/ y", "x-y"), ("a" * 99, "a" * 60)])
def test_any_prompt_makes_a_file_name_in_the_folder(prompt: str, stem: str, run: Path, draw: Draw, tmp_path) -> None:
    (path,) = draw(run, prompt=prompt, steps=1)
    assert path == tmp_path / "images" / f"{stem}-seed0.png"
    assert recipe_of(path)["prompt"] == prompt


# The base.


@pytest.fixture(scope="module")
def run_on_folder(quick_config, tmp_path_factory) -> Path:
    """A run on a local copy of `tiny`, with a finished adapter."""
    root = tmp_path_factory.mktemp("local")
    base = shutil.copytree(resolve_base("tiny").path, root / "my-sd3")
    run_training(quick_config(root / "run", f"model.base={base}", "train.steps=1"))
    return root / "run"


def test_a_local_base_is_found_through_the_run(run_on_folder: Path, draw: Draw, capsys, monkeypatch) -> None:
    checkpoint = run_on_folder / "checkpoints" / "step-000001"
    images = [opened(*draw(location, steps=1)) for location in (run_on_folder, checkpoint)]
    monkeypatch.chdir(run_on_folder / "adapter")
    images += [opened(*draw(location, steps=1)) for location in (".", ADAPTER_FILE)]
    assert all(distance(image, images[0]) == 0 for image in images)
    assert "warning" not in capsys.readouterr().out


def test_a_local_base_is_named_without_its_path(run_on_folder: Path, draw: Draw) -> None:
    (path,) = draw(run_on_folder, steps=1)
    assert recipe_of(path)["base"] == "my-sd3"
    assert read_adapter(run_on_folder).contract["base"] == "my-sd3"
    assert str(run_on_folder.parent).encode() not in path.read_bytes()


def test_away_from_its_run_such_an_adapter_asks_for_the_base(run_on_folder: Path, draw: Draw, tmp_path: Path) -> None:
    lone = tmp_path / "lone.safetensors"
    shutil.copy(run_on_folder / "adapter" / ADAPTER_FILE, lone)
    with pytest.raises(AdapterError, match=rf"^{lone}: trained on a local folder named 'my-sd3'; give it with --base$"):
        draw(lone)
    (path,) = draw(lone, base=str(run_on_folder.parent / "my-sd3"), steps=1)
    assert distance(opened(path), opened(*draw(run_on_folder, steps=1))) == 0


def test_an_adapter_of_another_tool_asks_for_the_base(run: Path, draw: Draw, tmp_path: Path) -> None:
    adapter = read_adapter(run)
    foreign = copy_of(run, tmp_path, **dict.fromkeys(adapter.contract))
    with pytest.raises(AdapterError, match="names no base model; give one with --base"):
        draw(foreign)
    assert len(draw(foreign, base="tiny", size=(64, 64), steps=1)) == 1


def test_the_base_may_be_named_by_any_of_several_adapters(run: Path, draw: Draw, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    theirs = tmp_path / "theirs" / "lora.safetensors"
    save_file(load_file(run / "adapter" / ADAPTER_FILE), theirs)
    (theirs_first,) = draw(theirs, run, steps=1)
    assert recipe_of(theirs_first)["base"] == "tiny"
    assert recipe_of(theirs_first)["max_sequence_length"] == 77
    (ours_first,) = draw(run, theirs, steps=1)
    assert distance(opened(theirs_first), opened(ours_first)) <= 1
    with pytest.raises(AdapterError, match="names no base model"):
        draw(theirs, theirs)


def test_a_base_with_other_weights_is_pointed_out(run: Path, draw: Draw, capsys) -> None:
    draw(run, steps=1)
    said = capsys.readouterr().out
    assert "warning" not in said
    assert f"{run / 'adapter' / ADAPTER_FILE}: 76 tensors loaded, weight 1" in said
    draw(f"{run}@0.5", base="tiny-sd3", steps=1)
    said = capsys.readouterr().out
    assert "was trained on tiny, whose weights differ from tiny-sd3" in said
    assert "60 tensors loaded, weight 0.5" in said
    assert "warning: 8 of its modules are not in this base: transformer_blocks.0.attn2." in said


def test_adapters_trained_under_different_conditions_are_pointed_out(run: Path, draw: Draw, tmp_path, capsys) -> None:
    other = copy_of(run, tmp_path / "other", max_sequence_length=16)
    (path,) = draw(other, run, steps=1)
    assert "trained with different max_sequence_length; the first one's is used" in capsys.readouterr().out
    assert recipe_of(path)["max_sequence_length"] == 16


# Mistakes.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num": 0}, "--num 0: at least 1"),
        ({"num": 10**30}, f"--num {10**30}: at most 100000"),
        ({"batch": 100_001}, "--batch 100001: at most 100000"),
        ({"steps": -1}, "--steps -1: at least 1"),
        ({"seed": -1}, "--seed -1: at least 0"),
        ({"seed": 2**63}, "--seed 9223372036854775808: at least 0, and below"),
        ({"sampler": "ddim"}, "--sampler ddim: one of euler, heun, dpmpp"),
        ({"shift": 0.0}, "--shift 0: a number above 0"),
        ({"shift": float("inf")}, "--shift inf: a number above 0"),
        ({"guidance": float("nan")}, "--guidance nan: a finite number"),
        ({"size": (100, 64)}, "--size 100x64: both sides must be multiples of 16"),
        ({"size": (0, 0)}, "--size 0x0: both sides"),
        ({"size": (64, 2048)}, "--size 64x2048: this base draws at most 1536 pixels a side"),
        ({"base": "tinny"}, "tinny: no such base"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_one_line(options: dict, said: str, run: Path, draw: Draw, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        draw(run, **options)
    (line,) = caught.value.problems
    assert line.startswith(said)
    assert not (tmp_path / "images").exists()


def test_wrong_options_are_all_named(draw: Draw) -> None:
    with pytest.raises(ConfigError) as caught:
        draw(num=0, size=(1, 16))
    assert len(caught.value.problems) == 3
    assert caught.value.problems[0].startswith("give --lora PATH, or --base")


@pytest.mark.parametrize("weight", ["half", "", "nan", "inf"])
def test_a_wrong_weight_is_one_line(weight: str, run: Path, draw: Draw) -> None:
    said = rf"^--lora .*@{weight}: '{weight}' is not a weight; write PATH@0\.8, or for a revision user/name:revision$"
    with pytest.raises(AdapterError, match=said):
        draw(f"{run}@{weight}")


@pytest.mark.parametrize(
    ("ending", "says"),
    [
        (":0.8", r"write {run}@0\.8"), (":1", "write {run}@1"), (":-.5", r"write {run}@-\.5"),
        (":main", "write {run}; only a Hub repository has revisions"), (":0.8@2", r"write {run}@0\.8"),
    ],
)  # fmt: skip
def test_a_weight_as_other_tools_write_it_is_shown_as_ours(ending: str, says: str, run: Path) -> None:
    for path in (run, run / "adapter" / ADAPTER_FILE):
        for flag in ("--lora ", ""):
            with pytest.raises(
                AdapterError, match=f"^{flag}{path}{ending.partition('@')[0]}: {says.format(run=path)}$"
            ):
                parse_lora(f"{path}{ending}", flag)


def test_a_colon_in_a_name_or_in_front_of_a_revision_is_no_weight(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dog:2").mkdir()
    Path("dog").mkdir()
    assert parse_lora("dog:2") == (Path("dog:2"), 1.0)
    assert parse_lora("dog:2@0.5") == (Path("dog:2"), 0.5)
    assert parse_lora("user/dog:0.8") == (Path("user/dog:0.8"), 1.0)


def test_a_missing_adapter_is_one_line(draw: Draw, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=rf"^{tmp_path}/nothing: no such file or folder$"):
        draw(tmp_path / "nothing")


def test_an_adapter_for_another_shape_is_refused_before_anything_is_written(run: Path, draw: Draw, tmp_path) -> None:
    with pytest.raises(AdapterError, match="is 64x64 in the adapter and 96x96 in the model"):
        draw(run, base="tiny-sd35-large")
    assert not (tmp_path / "images").exists()


def test_an_out_that_is_a_file_is_one_line(run: Path, draw: Draw, tmp_path: Path) -> None:
    (tmp_path / "images").touch()
    with pytest.raises(
        RunError, match=rf"^--out: {tmp_path}/images cannot be made: File exists; choose another folder$"
    ):
        draw(run)


def test_a_base_that_lost_its_weights_is_one_line(run: Path, draw: Draw, tmp_path: Path) -> None:
    broken = shutil.copytree(resolve_base("tiny").path, tmp_path / "broken")
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights here"):
        draw(run, base=str(broken))


def test_a_picture_that_is_not_finite_is_said_to_be_by_its_name(run: Path, draw: Draw, tmp_path: Path, capsys) -> None:
    tensors = load_file(run / "adapter" / ADAPTER_FILE)
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    for huge in (key, key.replace("lora_B", "lora_A")):
        tensors[huge] = torch.full_like(tensors[huge], 1e30)
    with safe_open(run / "adapter" / ADAPTER_FILE, framework="pt") as file:
        save_file(tensors, tmp_path / "huge.safetensors", metadata=file.metadata())
    (path,) = draw(tmp_path / "huge.safetensors")
    assert opened(path).getextrema() == ((0, 0),) * 3
    assert f"warning: {path}: black, as the model computed NaN or infinity" in capsys.readouterr().out
    (path,) = draw(run)
    assert "warning" not in capsys.readouterr().out

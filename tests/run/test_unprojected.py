"""CLIP-L files whose projection an earlier version applied: what it wrote is told apart, and never mixed with new."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.errors import RunError
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.recipes import read_recipe
from sd3tune.model.base.resolve import resolve_base
from sd3tune.run.preflight import make_plan

NOTE = "CLIP-L's text_projection is not used: Stable Diffusion 3 takes the unprojected vector"
REASON = "--resume: model.clip_l_pooled: an earlier sd3tune encoded the run's captions with CLIP-L's text_projection"
DRAWING = {"prompt": "a dog", "steps": 1, "guidance": 1.0, "size": (64, 64), "before": False}


@pytest.fixture(scope="module")
def clip_l(single_file) -> Path:
    """With a learned projection."""
    return single_file("tiny").with_name("clip_l.safetensors")


@pytest.fixture(scope="module")
def finished(quick_config, clip_l: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "learned"
    run_training(quick_config(run, f"model.text_encoders.clip_l={clip_l}", "train.steps=2", "checkpoint.every=1"))
    return run


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_of_before_is_not_resumed_on_other_encodings(
    quick_config, clip_l: Path, finished: Path, tmp_path: Path, capsys, edit_json, steps: int
) -> None:
    """A finished one, too, as it would be taken for one of the new encodings."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    config = quick_config(run, f"model.text_encoders.clip_l={clip_l}", f"train.steps={steps}", "checkpoint.every=1")
    run_training(config, resume=True)
    assert (NOTE in capsys.readouterr().out) is (steps == 3)
    for state in run.glob("checkpoints/*/state.json"):
        edit_json(state, lambda found: found["identity"]["model"].pop("clip_l_pooled"))
    with pytest.raises(RunError) as caught:
        run_training(config, resume=True)
    assert caught.value.problems[0].startswith(REASON)


def test_an_adapter_and_a_picture_of_before_say_why_they_come_out_differently(
    finished: Path, clip_l: Path, tmp_path: Path, capsys, edit_json
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (picture,) = run_infer(InferenceJob.from_fields(loras=[str(run)], out=tmp_path / "images", **DRAWING))
    run_infer(InferenceJob.from_fields(loras=[str(run)], prompt=None, from_picture=picture, out=tmp_path / "again"))
    recipe = read_recipe(picture)
    assert recipe is not None
    assert recipe["clip_l_pooled"] == "unprojected"
    assert "warning" not in capsys.readouterr().out

    edit_json(picture, lambda found: found.pop("clip_l_pooled"))
    run_infer(InferenceJob.from_fields(loras=[str(run)], prompt=None, from_picture=picture, out=tmp_path / "warned"))
    assert (
        f"warning: {picture} was drawn with CLIP-L's text_projection, by an earlier sd3tune" in capsys.readouterr().out
    )
    before = resolve_base("tiny", encoder_files={"clip_l": str(clip_l)}).fingerprint("text_encoder", uses_all=True)
    adapter = run / "adapter" / "pytorch_lora_weights.safetensors"
    edit_json(adapter, lambda contract: contract["encoder_files"]["clip_l"].update(fingerprint=before))
    run_infer(InferenceJob.from_fields(loras=[str(run)], out=tmp_path / "warned-as-well", **DRAWING))
    warned = "was trained with the text_projection of clip_l.safetensors, by an earlier sd3tune"
    assert warned in capsys.readouterr().out


def test_class_images_drawn_with_the_projection_are_not_taken(quick_config, clip_l: Path, tmp_path: Path) -> None:
    prior = "data.sources.0.prior={prompt: a dog, images: 2, steps: 1}"
    names = []
    for number, own in enumerate((f"model.text_encoders.clip_l={clip_l}", "train.steps=3")):
        plan = make_plan(quick_config(tmp_path / str(number), prior, own), torch.device("cpu"), resume=None)
        names.append([drawn.path.name for planned in plan.priors for drawn in planned.drawn])
    assert names[0]
    assert not set(names[0]) & set(names[1])

"""A LoRA on a base in 4 or 8 bits: trained, previewed, resumed, stated, and drawn on the same base by `infer`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.encode import captions
from sd3tune.errors import ConfigError, RunError, UserError
from sd3tune.inference.job import IN_FULL, InferenceJob, Memory
from sd3tune.training.loop import View

pytest.importorskip("bitsandbytes")

PREVIEW = "preview={every: 2, prompts: [a photo of sks dog], steps: 2, guidance: 4.0, seed: 11}"
T5 = "model.t5_quantize=int8"
OPTIONS = ("train.steps=3", "checkpoint={every: 2, keep: 9}", "ema={decay: 0.5}", "method.alpha=3.0", PREVIEW, T5)


@pytest.fixture(scope="module", params=["nf4", "int8"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(quick_config, tmp_path_factory, form: str) -> Path:
    run = tmp_path_factory.mktemp("runs") / form
    run_training(quick_config(run, *OPTIONS, f"model.quantize={form}"))
    return run


def drawn(run: Path, out: Path, memory: Memory = IN_FULL) -> Image.Image:
    asked = {"seed": 11, "steps": 2, "guidance": 4.0, "before": False, **vars(memory)}
    return Image.open(
        run_infer(InferenceJob.from_fields(loras=[str(run)], prompt="a photo of sks dog", out=out, **asked))[0]
    )


def preview_of(run: Path) -> Image.Image:
    return Image.open(run / "samples" / "step-000003-0.png")


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


def test_infer_draws_the_preview_on_a_base_held_as_in_training(run: Path, form: str, tmp_path: Path, capsys) -> None:
    preview = preview_of(run)
    assert same(drawn(run, tmp_path / "as_trained"), preview)
    said = capsys.readouterr().out
    assert f"was trained with its base in {form}; using the same here" in said
    assert "was trained with T5 in int8; using the same here" in said
    assert not same(drawn(run, tmp_path / "whole", Memory(quantize="none")), preview)
    assert not same(drawn(run, tmp_path / "whole_t5", Memory(t5_8bit=False)), preview)


def test_it_is_stated_where_it_matters(run: Path, form: str) -> None:
    contract = read_adapter(run / "adapter").contract
    assert (contract["quantize"], contract["t5_quantize"]) == (form, "int8")
    assert f"the base's blocks in {form}" in (run / "README.md").read_text()


def test_a_stopped_run_goes_on_exactly_and_only_with_the_same_base(
    run: Path, form: str, quick_config, tmp_path: Path, assert_equal_runs
) -> None:
    def stop(view: View) -> None:
        if view.step == 2:
            raise KeyboardInterrupt

    options = (*OPTIONS, "train.gradient_checkpointing=selective")  # which changes no bit
    config = quick_config(tmp_path / "run", *options, f"model.quantize={form}")
    with pytest.raises(RunError, match="saved at step-000002"):
        run_training(config, callbacks=[stop])
    with pytest.raises(RunError, match=f'model.quantize: "{form}" in the run, null now'):
        run_training(quick_config(tmp_path / "run", *options), resume=True)
    run_training(config, resume=True)
    assert_equal_runs(run, tmp_path / "run")


def test_a_run_that_is_resumed_in_int8_differs_in_that_alone(quick_config, tmp_path: Path) -> None:
    run_training(quick_config(tmp_path, "train.steps=1"))
    with pytest.raises(RunError) as caught:
        run_training(quick_config(tmp_path, "train.steps=2", "model.quantize=int8"), resume=True)
    assert caught.value.problems[:-1] == ('--resume: model.quantize: null in the run, "int8" now',)


def test_a_run_that_an_earlier_version_began_in_int8_goes_on_with_its_embeddings(
    form: str, quick_config, tmp_path: Path, edit_json, monkeypatch, capsys
) -> None:
    """Its layers also rounded activations, which is said. The run's T5 is in int8 for both forms."""
    with monkeypatch.context() as before:
        before.setattr(captions, "_FORM_NAMES", {})
        run_training(quick_config(tmp_path / "run", *OPTIONS, f"model.quantize={form}"))
    capsys.readouterr()
    for state in (tmp_path / "run").glob("checkpoints/*/state.json"):
        edit_json(state, lambda found: found["identity"]["model"].pop("int8"))
    run_training(quick_config(tmp_path / "run", *OPTIONS, f"model.quantize={form}"), resume=True)
    assert "already finished" in capsys.readouterr().out
    run_training(quick_config(tmp_path / "run", *OPTIONS, f"model.quantize={form}", "train.steps=4"), resume=True)
    said = capsys.readouterr().out
    assert "warning: an earlier sd3tune began this run with layers in LLM.int8()" in said
    assert "x 3 encoders, all reused" in said


def test_what_cannot_be_is_one_line(quick_config, tmp_path: Path, run: Path, form: str, monkeypatch) -> None:
    with pytest.raises(UserError, match=f"model.quantize is {form} and method.kind is full"):
        quick_config(tmp_path, f"model.quantize={form}", "method={kind: full}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if form == "int8":
        assert same(drawn(run, tmp_path / "offloaded", Memory(offload=True)), preview_of(run)), "needs no library"
        return
    with pytest.raises(UserError, match=f"model.quantize: {form} needs bitsandbytes: pip install"):
        run_training(quick_config(tmp_path, f"model.quantize={form}"))
    with pytest.raises(ConfigError, match=r"which needs bitsandbytes: .*; --quantize none takes the whole base"):
        drawn(run, tmp_path / "missing")


@pytest.mark.long
def test_little_is_lost_on_a_base_that_knows_something(quick_config, tmp_path: Path) -> None:
    """nano in 4 bits, after five steps: the loss on its training images at fixed noise."""
    losses = {}
    for form in ("none", "nf4"):
        settings = ("model.base=nano", f"model.quantize={form}", "train.steps=5", "train.batch_size=2")
        run_training(quick_config(tmp_path / form, *settings))
        report = json.loads((tmp_path / form / "run.json").read_text())["report"]["fixed_noise_loss"]
        losses[form] = {name: torch.tensor(report[name]).mean().item() for name in ("base", "trained")}
    learned = losses["none"]["base"] - losses["none"]["trained"]
    assert learned > 0.3
    assert losses["nf4"]["trained"] < losses["none"]["trained"] + 0.1 * learned

"""Evaluations during training: what they draw, measure and keep, and that the training does not notice them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from sd3tune.commands.infer import run_infer
from sd3tune.commands.plan import _length_lines
from sd3tune.commands.train import run_training
from sd3tune.config import Config, load_config
from sd3tune.config.sections.outputs import TrackingConfig
from sd3tune.errors import UserError
from sd3tune.evaluation import during_training
from sd3tune.evaluation.during_training import Evaluations
from sd3tune.evaluation.lines import best_of, measured_line, without_a_better_one
from sd3tune.evaluation.measuring import CLASS_SUBJECT, SUBJECT, Measured
from sd3tune.evaluation.pictures import OF_CLASS, SCORED, Picture
from sd3tune.evaluation.target import find_target
from sd3tune.forecast.forecast import forecast, forecast_inputs
from sd3tune.inference.job import InferenceJob
from sd3tune.measures.encoders import EncoderSpec, register, unregister
from sd3tune.run.callbacks.base import Setup
from sd3tune.run.finished import Run
from sd3tune.run.preflight import make_plan
from sd3tune.run.previews import run_of, step_of
from sd3tune.runtime.processes import Processes
from sd3tune.tracking.base import Start
from sd3tune.tracking.trackers import Trackers
from sd3tune.training.checkpoint import list_checkpoints
from sd3tune.training.loop import View
from tests.evaluation.conftest import OTHERS, SmallPictures

WEIGHTS = "adapter/pytorch_lora_weights.safetensors"
PROMPTS = ["sks dog on a beach", "a drawing of sks dog"]
CLASS_PROMPTS = ["a dog on a beach", "a drawing of a dog"]
MEASURED = "eval/measured"

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def make(quick_config, tiny_images: Path) -> Make:
    """`make(run, "patience: 1", "train.steps=4")`: a run that is measured every two steps; None: it is not."""
    source = f"data.sources=[{{path: {tiny_images}, prior: {{kind: prediction, prompt: a photo of a dog}}}}]"
    without = ", ".join(f"{name}: none" for name in OTHERS)

    def config(run: Path, settings: str | None, *overrides: str) -> Config:
        own = f"every: 2, prompts: [{', '.join(PROMPTS)}], encoders: {{{without}}}"
        measured = [] if settings is None else [f"eval={{{', '.join(filter(None, [own, settings]))}}}"]
        common = ("data.trigger=sks", "train.steps=5", "checkpoint={every: 1, keep: 9}", "ema={decay: 0.5}")
        return quick_config(run, source, *common, "preview={steps: 1, guidance: 2.0}", *measured, *overrides)

    return config


class Sizes:
    """Features that are the size of a picture, so that all drawn pictures are equally like the photos."""

    name, source = "sizes", "sizes"

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        return torch.nn.functional.normalize(torch.tensor([[*one.size, 1.0] for one in pictures]), dim=1)


@pytest.fixture
def sizes() -> Iterator[None]:
    register(EncoderSpec("sizes", "sizes", None, ("subject",)), lambda spec, device: Sizes())
    yield
    unregister("sizes")


@pytest.fixture(scope="module")
def run(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measured run, of which the best weights are kept by evaluation. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "measured"
    register(EncoderSpec("small", "pixels", None, ("subject", "prompt")), lambda spec, device: SmallPictures())
    run_training(make(folder, "seeds: 2", "checkpoint.best=eval"))
    unregister("small")
    return folder


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def picture(run: Path, row: str, kind: str, number: int, seed: int) -> Image.Image:
    return Image.open(run / MEASURED / "pictures" / f"{row}-{kind}{number:02d}-seed{seed}.png")


def test_it_measures_every_so_often_and_after_the_last_step(run: Path) -> None:
    found = lines(run)
    assert [line["step"] for line in found] == [2, 4, 5]
    assert {(line["encoder"], line["prompt_encoder"], line["pictures"], line["weights"]) for line in found} == {
        ("small", "small", 8, "ema")
    }
    assert len({line["likeness"] for line in found}) == 3
    assert len({(line["base_likeness"], line["base_drift"], line["setting"]) for line in found}) == 1
    assert Run(run).report["evaluation"]["last"] == found[-1]


def test_the_figures_are_those_of_the_pictures_computed_apart(run: Path, tiny_images: Path) -> None:
    def features(images: Sequence[Image.Image]) -> Tensor:
        return SmallPictures().images(images).double()

    photos = features([Image.open(path) for path in sorted(tiny_images.glob("*.png"))])
    line = lines(run)[1]
    for row, prefix in (("step-000004", ""), ("base", "base_")):
        of = {
            kind: features([picture(run, row, kind, number, seed) for number in (0, 1) for seed in (0, 1)])
            for kind in ("prompt", "class")
        }
        assert line[f"{prefix}likeness"] == pytest.approx(float((of["prompt"] @ photos.T).mean()), abs=1e-6)
        assert line[f"{prefix}drift"] == pytest.approx(float((of["class"] @ photos.T).mean()), abs=1e-6)
        assert line[f"{prefix}diversity"] == pytest.approx(
            float(1 - torch.stack([of["prompt"][0] @ of["prompt"][1], of["prompt"][2] @ of["prompt"][3]]).mean()),
            abs=1e-6,
        )
    others = photos @ photos.T
    among = float((others.sum() - others.trace()) / (len(photos) * (len(photos) - 1)))
    assert line["photos_likeness"] == pytest.approx(among, abs=1e-6)


@pytest.mark.parametrize(
    ("row", "scale", "kind", "prompt"),
    [
        ("step-000004", 1, "prompt", PROMPTS[1]),
        ("step-000004", 1, "class", CLASS_PROMPTS[1]),
        ("base", 0, "prompt", PROMPTS[1]),
    ],
)
def test_a_picture_is_what_infer_draws(run: Path, tmp_path: Path, row: str, scale: int, kind: str, prompt: str) -> None:
    adapter = f"{run / MEASURED / 'step-000004'}@{scale}"
    (path,) = run_infer(InferenceJob.from_fields(loras=[adapter], prompt=prompt, out=tmp_path, seed=1, before=False))
    assert Image.open(path).tobytes() == picture(run, row, kind, 1, 1).tobytes()


def test_each_measured_adapter_is_kept_and_the_best_one_in_best(run: Path) -> None:
    for step in (2, 4, 5):
        name = f"step-{step:06d}"
        file = run / MEASURED / name / WEIGHTS
        assert file.read_bytes() == (run / "checkpoints" / name / WEIGHTS).read_bytes()
        assert (run_of(file), step_of(file, run)) == (run, step)
    best = best_of(lines(run), None)
    assert best is not None
    assert json.loads((run / "best" / "evaluation.json").read_text()) == best == Run(run).report["evaluation"]["best"]
    assert (run / "best" / WEIGHTS).read_bytes() == (
        run / "checkpoints" / f"step-{best['step']:06d}" / WEIGHTS
    ).read_bytes()
    assert step_of(run / "best" / WEIGHTS, run) == best["step"]
    assert (
        f"step {best['step']} was best: likeness to the photos {best['likeness']:.3f}"
        in (run / "README.md").read_text()
    )


def test_the_training_does_not_notice_and_needs_no_checkpoints_for_eval(
    run: Path, make: Make, tmp_path: Path, assert_equal_runs
) -> None:
    run_training(make(tmp_path / "plain", None))
    without = Path(shutil.copytree(run, tmp_path / "measured"))
    shutil.rmtree(without / "eval")
    shutil.rmtree(without / "best")
    assert_equal_runs(without, tmp_path / "plain")
    shutil.copytree(run / "eval", without / "eval")
    shutil.rmtree(without / "checkpoints" / "step-000004")
    assert [weights.step for weights in find_target(str(without), "all").weights] == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("small_encoder")
def test_a_resumed_run_ends_with_the_same_measurements(
    run: Path, make: Make, tmp_path: Path, assert_equal_runs
) -> None:
    resumed = Path(shutil.copytree(run, tmp_path / "resumed"))
    for step in (4, 5):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:06d}")
    (resumed / MEASURED / "pictures" / "step-000004-class00-seed1.png").unlink()
    shutil.rmtree(resumed / MEASURED / "step-000005")
    run_training(make(resumed, "seeds: 2", "checkpoint.best=eval"), resume=True)
    assert lines(resumed) == lines(run)
    assert_equal_runs(resumed, run)
    for path in sorted((run / MEASURED / "pictures").iterdir()):
        assert path.read_bytes() == (resumed / MEASURED / "pictures" / path.name).read_bytes()


@pytest.mark.usefixtures("small_encoder")
def test_a_fresh_start_forgets_what_an_attempt_without_checkpoint_measured(make: Make, tmp_path: Path) -> None:
    def fail_at_2(view) -> None:
        if view.step == 2:
            raise ValueError("a callback of the caller")

    config = make(tmp_path, "", "checkpoint.every=9", "train.steps=3")
    with pytest.raises(ValueError, match="of the caller"):
        run_training(config, callbacks=[fail_at_2])
    own = tmp_path / MEASURED / "notes.txt"
    own.write_text("mine")
    stale = tmp_path / MEASURED / "step-000001" / WEIGHTS
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    run_training(make(tmp_path, None, "train.steps=1"))
    assert not (tmp_path / "eval.jsonl").exists()
    assert [path for path in (tmp_path / "eval").rglob("*") if path.is_file()] == [own]


@pytest.mark.usefixtures("sizes")
def test_patience_ends_a_run_which_is_then_finished_and_can_go_on(
    run: Path, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def facts() -> dict:
        return json.loads((tmp_path / "run.json").read_text())

    early = ("eval.every=1", "checkpoint={every: 3, keep: 1, best: eval}")
    run_training(make(tmp_path, "patience: 1", *early))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]
    assert facts()["stopped_early"] == {"step": 2, "patience": 1}
    assert "steps | 2 of 5, stopped early" in (tmp_path / "README.md").read_text()
    assert "stopped early at step 2: 1 measurement without a better one than at step 1" in capsys.readouterr().out
    weights = (tmp_path / WEIGHTS).read_bytes()
    assert weights == (run / MEASURED / "step-000002" / WEIGHTS).read_bytes()

    run_training(make(tmp_path, "patience: 1", *early), resume=True)
    assert "already finished, stopped early at step 2; nothing to do" in capsys.readouterr().out

    (tmp_path / "run.json").write_text(json.dumps({name: of for name, of in facts().items() if name != "report"}))
    run_training(make(tmp_path, "patience: 1", *early), resume=True)  # as if it was killed before its report
    assert facts()["stopped_early"] == {"step": 2, "patience": 1}
    assert (tmp_path / WEIGHTS).read_bytes() == weights

    run_training(make(tmp_path, "", *early), resume=True)
    assert "stopped_early" not in facts()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "best" / "evaluation.json").read_text()) == lines(tmp_path)[0]  # of equal ones
    assert (tmp_path / "best" / WEIGHTS).read_bytes() == (tmp_path / MEASURED / "step-000001" / WEIGHTS).read_bytes()
    for name in (WEIGHTS, "metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.usefixtures("small_encoder")
def test_without_an_encoder_or_memory_training_goes_on(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    missing = f"eval.encoders={{dinov2: {tmp_path / 'empty'}, nano: none, small: none, clip: none, dino: none}}"
    run_training(make(tmp_path / "offline", "", missing, "train.steps=4"))
    out = capsys.readouterr().out
    assert out.count("warning: eval: not measured: dinov2: ") == 1
    assert "--encoder" not in out
    assert out.count("warning: eval: no encoder of likeness can be loaded, so nothing is drawn or measured") == 1
    assert not (tmp_path / "offline" / "eval").exists()

    def exhausted(*arguments: object, **settings: object) -> list[Image.Image]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(during_training, "draw_prompts", exhausted)
    run_training(make(tmp_path / "full", "", "train.steps=2"))
    warning = "step 2: no evaluation, out of memory"
    assert f"warning: {warning}; training continues" in capsys.readouterr().out
    assert warning in json.loads((tmp_path / "full" / "run.json").read_text())["warnings"]


def line(step: int, likeness: float, drift: float | None = None, **other: str) -> dict:
    return {"step": step, "likeness": likeness, "drift_share": drift, "setting": "a", "encoder": "b", **other}


def test_the_best_has_the_highest_likeness_within_the_drift_limit() -> None:
    rising = [line(1, 0.5, 0.0), line(2, 0.6, 0.1), line(3, 0.7, 0.26), line(4, 0.6, 0.1)]
    for limit, step in ((None, 2), (0.3, 3), (0.05, 1)):
        best = best_of(rising, limit)
        assert best is not None
        assert best["step"] == step
    assert best_of([line(1, 0.5, 0.3)], None) is None
    assert best_of([line(1, 0.5), line(2, 0.4)], 0.01) == line(1, 0.5)
    assert [without_a_better_one(rising[:count], None) for count in range(5)] == [0, 0, 0, 1, 2]
    assert without_a_better_one([line(1, 0.5, 0.3), line(2, 0.6, 0.4)], None) == 2


def test_lines_of_other_prompts_or_encoders_do_not_compete() -> None:
    other = [line(1, 0.9, setting="other"), line(2, 0.9, encoder="other")]
    assert best_of([*other, line(3, 0.5)], None) == line(3, 0.5)
    assert without_a_better_one([*other, line(3, 0.5)], None) == 0


def test_likeness_and_drift_are_shares_of_the_way_to_the_photos() -> None:
    def pictures(row: str, likeness: float, drift: float) -> dict[Picture, dict]:
        of_class = Picture(row, OF_CLASS, 0, 0, Path(), "a dog", "a dog")
        named = Picture(row, SCORED, 0, 0, Path(), "sks dog", "a dog")
        return {named: {(SUBJECT, "e"): likeness}, of_class: {(CLASS_SUBJECT, "e"): drift}}

    both = pictures("base", 0.5, 0.4) | pictures("step-000002", 0.6, 0.44)
    photos = [{(SUBJECT, "e"): 0.7}, {(SUBJECT, "e"): 0.7}]
    found = measured_line(Measured(list(both), list(both.values()), photos), 2, "step-000002")
    assert found is not None
    assert (found["share"], found["drift_share"]) == (pytest.approx(0.5), pytest.approx(0.2))
    assert (found["prompt"], found["diversity"], found["likeness_low"]) == (None, None, None)
    found = measured_line(Measured(list(both), list(both.values()), photos[:0]), 2, "step-000002")
    assert found is not None
    assert (found["share"], found["drift_share"], found["photos_likeness"]) == (None, None, None)
    assert measured_line(Measured(list(both), [{} for _ in both], []), 2, "step-000002") is None


def test_all_processes_end_as_the_first_one_decides(make: Make, tmp_path: Path) -> None:
    plan = make_plan(make(tmp_path, "patience: 3"), torch.device("cpu"), resume=None)
    for decided in (1.0, 0.0):
        second = Processes(
            1, 2, lambda t: t, lambda t, d=decided: torch.stack([torch.full_like(t, d), t]), lambda: None
        )
        trackers = Trackers(TrackingConfig(), Start("run", tmp_path, {}), print)
        evaluations = Evaluations.make(Setup(plan, cast(Any, None), second, {}, trackers, 0))
        assert evaluations is not None
        evaluations(View(2, False, cast(Any, None), plan.method, {}))
        assert evaluations.ended == bool(decided)


@pytest.mark.parametrize(
    ("settings", "overrides", "problem"),
    [
        (None, ["checkpoint.best=eval"], "checkpoint.best is eval but eval is null"),
        ("", ["eval.encoders={dino2: none}"], "eval.encoders: encoder 'dino2': no such encoder"),
        ("", ["eval.prompts=[a photo of a dog]"], "eval.prompts: the training uses all of them"),
        ("", ["eval.patience=0"], "eval.patience"),
    ],
)
def test_mistakes_are_named_before_anything_is_encoded(
    make: Make, tmp_path: Path, settings: str | None, overrides: list[str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        run_training(make(tmp_path / "run", settings, *overrides))
    assert not (tmp_path / "run").exists()


def test_a_local_encoder_is_relative_to_the_configuration_and_a_hub_id_is_not(tmp_path: Path) -> None:
    (tmp_path / "near").mkdir()
    encoders = "{dinov2: ./absent, dino: near, clip: openai/clip, nano: none}"
    (tmp_path / "run.yaml").write_text(f"data: {{sources: [{{path: .}}]}}\neval: {{encoders: {encoders}}}\n")
    settings = load_config(tmp_path / "run.yaml").config.eval
    assert settings is not None
    local = {"dinov2": str(tmp_path / "absent"), "dino": str(tmp_path / "near")}
    assert settings.encoders == {**local, "clip": "openai/clip", "nano": "none"}


def test_the_plan_counts_pictures_texts_and_memory(make: Make, tmp_path: Path) -> None:
    off, on = (forecast(forecast_inputs(make(tmp_path, settings), torch.float32)) for settings in (None, "seeds: 2"))
    assert off.store is not None
    assert on.store is not None
    assert on.store.texts - off.store.texts == len([*PROMPTS, *CLASS_PROMPTS, ""])
    assert list(on.phases)[-2:] == ["preview", "evaluate"]
    assert on.phases["preview"].peak > on.training.resident
    assert not {"preview", "evaluate"} & off.phases.keys()
    lines = "\n".join(_length_lines(on, None, 40))
    assert "evaluate  3 x 8 pictures, and 8 of the base, each of 1 denoising steps" in lines
    assert "evaluate" not in "\n".join(_length_lines(off, None, 40))

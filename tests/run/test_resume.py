"""`--resume`: a run that was stopped ends as if it had not been; what cannot go on is refused and named."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file

from sd3tune.commands import train
from sd3tune.commands.train import run_training
from sd3tune.config import dump_config, load_config
from sd3tune.errors import RunError, UserError
from sd3tune.training.batches import Batch, Batches
from sd3tune.training.loop import View

STEPS = 12
EVERYTHING = (
    f"train.steps={STEPS}", "train.gradient_accumulation=2", "data.crop_variants=2", "data.flip=true",
    "ema={decay: 0.8}", "schedule={kind: cosine, warmup_steps: 3}", "checkpoint={every: 3, keep: 2}",
    "method.alpha=3.0",
)  # fmt: skip
"""24 samples of 5 images: almost five epochs, each in another order, of 4 variants an image."""


def stop_at(step: int):
    """A callback that ends the run from outside once that step is done."""

    def callback(view: View) -> None:
        if view.step == step:
            raise InterruptedError

    return callback


def stopped(config, step: int) -> None:
    with pytest.raises(InterruptedError):
        run_training(config, callbacks=[stop_at(step)])


@pytest.fixture(scope="module")
def straight(quick_config, tmp_path_factory) -> Path:
    """The run that was never stopped."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    run_training(quick_config(run, *EVERYTHING))
    return run


@pytest.fixture(scope="module")
def finished(quick_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    run_training(quick_config(run, "train.steps=2"))
    return run


def files_of(run: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [3, 7, 11])
def test_a_run_stopped_and_resumed_equals_one_never_stopped(
    quick_config, tmp_path: Path, straight: Path, assert_equal_runs, capsys, step: int
) -> None:
    run = tmp_path / "run"
    config = quick_config(run, *EVERYTHING)
    stopped(config, step)
    capsys.readouterr()
    run_training(config, resume=True)
    assert f"resuming from step-{step // 3 * 3:06d}" in capsys.readouterr().out
    assert_equal_runs(straight, run)
    assert json.loads((run / "run.json").read_text())["resumes"] == [{"from_step": step // 3 * 3}]


def test_a_moved_run_resumes_in_its_new_place_and_ends_as_if_it_had_stayed(
    quick_config, tmp_path: Path, straight: Path, assert_equal_runs, capsys
) -> None:
    stopped(quick_config(tmp_path / "run", *EVERYTHING), 7)
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "elsewhere" / "moved"))
    config = load_config(moved / "config.yaml").config
    with pytest.raises(UserError, match=r"moved: already holds a run \(step 6\); add --resume"):
        run_training(config)
    run_training(config, resume=True)
    assert "resuming from step-000006" in capsys.readouterr().out
    assert_equal_runs(straight, moved)
    assert load_config(moved / "config.yaml").notes == ()  # it was written anew
    assert not (tmp_path / "run").exists()


VARIANTS = (
    "train.steps=6", "train.gradient_accumulation=2", "checkpoint={every: 2, keep: 2}", "method.dropout=0.2",
    "method.targets=attention+mlp", "method.rank_pattern={attn.to_k: 4}", "method.rslora=true", "method.init=eva",
    "flow.timesteps.kind=mixture", "flow.min_sigma=0.05", "flow.noise_offset=0.1", "flow.input_perturbation=0.1",
    "flow.loss={kind: pseudo_huber, last_delta: 0.1, over: steps}",
    "flow.weighting.kind=min_snr", "flow.shift=resolution",
)  # fmt: skip


def test_variants_of_method_and_flow_resume_exactly_and_previews_change_nothing(
    quick_config, tmp_path: Path, assert_equal_runs
) -> None:
    settings = ("preview.steps=1", "preview.guidance=1.0")  # which the adapter states
    previews = "preview={every: 1, prompts: [a dog], steps: 1, guidance: 1.0}"
    run_training(quick_config(tmp_path / "straight", *VARIANTS, *settings))
    config = quick_config(tmp_path / "run", *VARIANTS, previews, "train.gradient_checkpointing=none")
    stopped(config, 3)
    run_training(config, resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


def test_a_run_that_went_on_from_an_adapter_resumes(quick_config, tmp_path: Path, finished, assert_equal_runs) -> None:
    settings = (f"method.start_from={finished}", "train.steps=4", "checkpoint.every=1", "method.alpha=3.0")
    run_training(quick_config(tmp_path / "straight", *settings))
    config = quick_config(tmp_path / "run", *settings)
    stopped(config, 2)
    moved = tmp_path / "moved.safetensors"
    shutil.copy(finished / "adapter" / "pytorch_lora_weights.safetensors", moved)
    run_training(quick_config(tmp_path / "run", *settings, f"method.start_from={moved}"), resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")
    stopped(quick_config(tmp_path / "other", *settings), 2)
    other = tmp_path / "straight"
    with pytest.raises(RunError, match=r"--resume: method\.start_from: "):
        run_training(quick_config(tmp_path / "other", *settings, f"method.start_from={other}"), resume=True)


OPTIMIZER_STATE = {
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "adamw8bit": {"step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"},
    "prodigy": {"step", "d", "numerator", "start", "s", "exp_avg", "exp_avg_sq"},
    "lion": {"exp_avg"},
    "muon": {"momentum_buffer"},
    "adafactor": {"step", "row_var", "col_var"},
    "schedulefree": {"z", "exp_avg_sq"},
    "paged_adamw8bit": {"state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"},
}


LONG = {"lion", "adafactor", "paged_adamw8bit"}
"""Optimizers that only `make check-long` resumes in whole runs; tests/training/test_checkpoint.py has all of them."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind in LONG)) for kind in OPTIMIZER_STATE]
)
def test_every_optimizer_resumes_exactly_also_around_skipped_steps(
    quick_config, tmp_path: Path, assert_equal_runs, lines_of, monkeypatch, kind: str
) -> None:
    """The gradients of steps 2 and 5 are NaN; the run is stopped after step 4 and goes on from there."""
    fetch = Batches.fetch

    def poisoned(self: Batches, step: int, micro: int) -> Batch:
        batch = fetch(self, step, micro)
        return replace(batch, latents=batch.latents * math.nan) if (step, micro) in ((1, 1), (4, 1)) else batch

    monkeypatch.setattr(Batches, "fetch", poisoned)
    d0 = ", d0: 1.0e-3" if kind == "prodigy" else ""
    settings = (
        f"optimizer={{kind: {kind}{d0}}}", "train.steps=6", "train.gradient_accumulation=2", "ema={decay: 0.8}",
        f"schedule={{kind: {'constant' if kind == 'schedulefree' else 'cosine'}, warmup_steps: 2}}",
        "checkpoint={every: 2, keep: 3}", "method.blocks=[0, 1]",
    )  # fmt: skip
    run_training(quick_config(tmp_path / "straight", *settings))
    config = quick_config(tmp_path / "run", *settings)
    stopped(config, 5)
    run_training(config, resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")
    assert [line["step"] for line in lines_of(tmp_path / "run") if line["grad_norm"] is None] == [2, 5]

    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "step-000006" / "state.safetensors")
    saved = {name.rpartition(".")[2]: one for name, one in checkpoint.items() if name.startswith("optimizer.")}
    assert saved.keys() == OPTIMIZER_STATE[kind]
    if "step" in saved:
        assert saved["step"].item() == 4
    quantised = {name for name, tensor in saved.items() if tensor.dtype == torch.uint8}
    assert quantised == ({"state1", "state2"} if kind.endswith("adamw8bit") else set())


def test_a_full_run_of_some_blocks_resumes_exactly_with_muon(quick_config, tmp_path: Path, assert_equal_runs) -> None:
    """Biases and scales have AdamW's state there, matrices a momentum."""
    settings = ("method={kind: full, blocks: [1, 3]}", "optimizer={kind: muon}", "train.steps=4", "ema={decay: 0.8}")
    run_training(quick_config(tmp_path / "straight", *settings))
    config = quick_config(tmp_path / "run", *settings, "checkpoint.every=2")
    stopped(config, 3)
    run_training(config, resume=True)
    for product in ("model", "model_raw"):
        file = f"{product}/transformer/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000004" / "state.safetensors")
    assert "optimizer.transformer_blocks.1.attn.to_q.weight.momentum_buffer" in saved
    assert "optimizer.transformer_blocks.3.attn.to_q.bias.exp_avg" in saved


def test_a_schedule_free_run_saves_the_average(quick_config, tmp_path: Path, adapter_of) -> None:
    run_training(quick_config(tmp_path, "optimizer={kind: schedulefree, lr: 1.0e-2}", "train.steps=3"))
    saved = load_file(tmp_path / "checkpoints" / "step-000003" / "state.safetensors")
    average = saved["master"].lerp(saved["optimizer.z"], 1 - 1 / 0.9)
    exported = torch.cat([tensor.flatten() for tensor in adapter_of(tmp_path).values()])
    assert torch.equal(exported.sort().values, average.sort().values)  # alpha = rank, so that nothing is folded in
    assert not torch.equal(average, saved["master"])


def test_a_run_may_be_stopped_more_than_once(quick_config, tmp_path: Path, straight: Path, assert_equal_runs) -> None:
    config = quick_config(tmp_path, *EVERYTHING)
    stopped(config, 4)
    with pytest.raises(InterruptedError):
        run_training(config, resume=True, callbacks=[stop_at(8)])
    run_training(config, resume=True)
    assert_equal_runs(straight, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["resumes"] == [{"from_step": 3}, {"from_step": 6}]


@pytest.mark.long
def test_a_killed_process_is_resumed(
    quick_config, tmp_path: Path, straight: Path, assert_equal_runs, start_cli
) -> None:
    run, file = tmp_path / "run", tmp_path / "c.yaml"
    config = quick_config(run, *EVERYTHING)
    file.write_text(dump_config(config))
    process = start_cli("train", file)
    while not (run / "checkpoints" / "step-000003").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(RunError, match="another process is training here"):
        run_training(config, resume=True)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (run / "adapter").exists()

    again = start_cli("-m", "sd3tune", "train", file, "--resume", prefix=[sys.executable])
    printed, errors = again.communicate()
    assert again.returncode == 0, errors
    assert "resuming from step-0000" in printed
    assert_equal_runs(straight, run)
    described = json.loads((run / "run.json").read_text())
    assert len(described["resumes"]) == 1
    assert described["argv"][1:] == ["train", str(file), "--resume"]


@pytest.mark.parametrize("wound", ["checkpoint", "metrics"])
def test_what_a_kill_left_half_written_does_no_harm(
    quick_config, tmp_path: Path, straight: Path, assert_equal_runs, wound: str
) -> None:
    config = quick_config(tmp_path, *EVERYTHING)
    stopped(config, 8)
    if wound == "checkpoint":
        half = tmp_path / "checkpoints" / ".tmp-4194305-step-000009"
        shutil.copytree(tmp_path / "checkpoints" / "step-000006", half)
        (half / "state.safetensors").write_bytes(b"half")
    else:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "loss": 0.')
    run_training(config, resume=True)
    assert_equal_runs(straight, tmp_path)


def test_no_line_is_lost_when_lines_are_written_seldom(
    quick_config, tmp_path: Path, straight: Path, assert_equal_runs
) -> None:
    """They are written before each checkpoint, as a resumed run does not train those steps again."""
    config = quick_config(tmp_path, *EVERYTHING, "train.log_every=100")
    stopped(config, 7)
    run_training(config, resume=True)
    assert_equal_runs(straight, tmp_path)


def test_a_run_killed_after_its_last_step_is_closed(
    quick_config, tmp_path: Path, straight: Path, assert_equal_runs
) -> None:
    config = quick_config(tmp_path, *EVERYTHING)
    stopped(config, STEPS)
    assert not (tmp_path / "adapter").exists()
    run_training(config, resume=True)
    assert_equal_runs(straight, tmp_path)
    assert "report" in json.loads((tmp_path / "run.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_in_hand_and_says_how_to_go_on(
    quick_config, tmp_path: Path, straight: Path, assert_equal_runs, number: signal.Signals
) -> None:
    def send(view: View) -> None:
        if view.step == 4:
            os.kill(os.getpid(), number)

    config = quick_config(tmp_path, *EVERYTHING)
    with pytest.raises(RunError, match="stopped, saved at step-000005; run the same command with --resume to continue"):
        run_training(config, callbacks=[send])
    run_training(config, resume=True)
    assert_equal_runs(straight, tmp_path)


def test_a_second_signal_stops_at_once(quick_config, tmp_path: Path, straight: Path, assert_equal_runs) -> None:
    def send(view: View) -> None:
        if view.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    config = quick_config(tmp_path, *EVERYTHING)
    with pytest.raises(RunError, match="stopped, saved at step-000003; "):
        run_training(config, callbacks=[send])
    run_training(config, resume=True)
    assert_equal_runs(straight, tmp_path)


def test_a_signal_before_training_keeps_what_was_encoded(quick_config, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*arguments) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "load_base", interrupted)
    with pytest.raises(RunError, match="stopped before the first checkpoint; encodings are kept: run the same command"):
        run_training(quick_config(tmp_path))
    assert not (tmp_path / "run.json").exists()


def test_nothing_to_resume_starts_afresh_and_says_so(quick_config, tmp_path: Path, capsys) -> None:
    run_training(quick_config(tmp_path / "run", "train.steps=1"), resume=True)
    assert f"nothing to resume in {tmp_path / 'run'}: starting afresh" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_finished_run_is_left_as_it_is(quick_config, finished: Path, capsys) -> None:
    before = files_of(finished)
    run_training(quick_config(finished, "train.steps=2"), resume=True)
    assert "already finished" in capsys.readouterr().out
    assert files_of(finished) == before


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lr=5e-3", "optimizer.lr: 0.01 in the run, 0.005 now"),
        ("model.base=tiny-sd3", "model.base: "),
        ("data.resolution=80", "data.resolution: 64 in the run, 80 now"),
        ("data.flip=true", "data.flip: false in the run, true now"),
        ("data.trigger=sks", 'data.trigger: null in the run, "sks" now'),
    ],
)
def test_a_finished_run_is_no_answer_to_another_configuration(
    quick_config, finished: Path, override: str, line: str
) -> None:
    before = files_of(finished)
    with pytest.raises(RunError) as caught:
        run_training(quick_config(finished, "train.steps=2", override), resume=True)
    assert [problem.startswith(f"--resume: {line}") for problem in caught.value.problems] == [True, False]
    assert files_of(finished) == before


def test_a_finished_run_needs_neither_its_encodings_nor_its_configuration(
    quick_config, finished: Path, tmp_path: Path, capsys
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "config.yaml").unlink()
    run_training(quick_config(run, "train.steps=2", f"data.cache_dir={tmp_path / 'store'}"), resume=True)
    assert "already finished" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def test_a_run_is_not_started_over_without_resume(quick_config, finished: Path) -> None:
    before = files_of(finished)
    with pytest.raises(UserError, match=r"already holds a run \(step 2\); add --resume"):
        run_training(quick_config(finished, "train.steps=4"))
    assert files_of(finished) == before


def test_a_constant_schedule_may_be_extended(quick_config, tmp_path: Path, assert_equal_runs, lines_of) -> None:
    settings = ("checkpoint={every: 2, keep: 1}", "schedule={kind: constant, warmup_steps: 1}", "ema={decay: 0.8}")
    run_training(quick_config(tmp_path / "long", *settings, "train.steps=4"))
    run_training(quick_config(tmp_path / "extended", *settings, "train.steps=2"))
    run_training(quick_config(tmp_path / "extended", *settings, "train.steps=4"), resume=True)
    assert [line["step"] for line in lines_of(tmp_path / "extended")] == [1, 2, 3, 4]
    assert_equal_runs(tmp_path / "long", tmp_path / "extended")


def test_a_loss_that_follows_the_steps_fixes_their_number(quick_config, tmp_path: Path) -> None:
    loss = "flow.loss={kind: pseudo_huber, last_delta: 0.1, over: steps}"
    run_training(quick_config(tmp_path, loss, "train.steps=1"))
    with pytest.raises(RunError, match=r"--resume: train\.steps: 1 in the run, 2 now"):
        run_training(quick_config(tmp_path, loss, "train.steps=2"), resume=True)


def test_an_extended_run_that_was_stopped_is_not_taken_for_finished(quick_config, tmp_path: Path, adapter_of) -> None:
    """Its folder holds the adapter of the shorter run."""
    run_training(quick_config(tmp_path, "train.steps=2"))
    short = adapter_of(tmp_path)
    config = quick_config(tmp_path, "train.steps=4")
    with pytest.raises(InterruptedError):
        run_training(config, resume=True, callbacks=[stop_at(4)])
    run_training(config, resume=True)
    assert any((tensor != short[key]).any() for key, tensor in adapter_of(tmp_path).items())


@pytest.fixture(scope="module")
def pausing(quick_config, tmp_path_factory) -> Path:
    """A run with a cosine schedule, stopped half way."""
    run = tmp_path_factory.mktemp("runs") / "pausing"
    stopped(quick_config(run, *COSINE), 2)
    return run


COSINE = ("train.steps=4", "schedule.kind=cosine", "checkpoint.every=2")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.steps=8", "train.steps: 4 in the run, 8 now"),
        ("train.batch_size=2", "train.batch_size: 1 in the run, 2 now"),
        ("flow.shift=2.0", "flow.shift: 1.0 in the run, 2.0 now"),
        ("flow.shift=model", "flow.shift: 1.0 in the run, 3.0 now"),
        ("flow.weighting={kind: min_snr, gamma: 5.0}", 'flow.weighting.kind: "none" in the run, "min_snr" now'),
        ("optimizer.lr=1e-3", "optimizer.lr: 0.01 in the run, 0.001 now"),
        ("optimizer={kind: adamw8bit, lr: 0.01}", 'optimizer.kind: "adamw" in the run, "adamw8bit" now'),
        ("seed=1", "seed: 0 in the run, 1 now"),
        ("method.alpha=4.0", "method.alpha: 2.0 in the run, 4.0 now"),
        ("method.dropout=0.1", "method.dropout: 0.0 in the run, 0.1 now"),
        ("method.rslora=true", "method.rslora: false in the run, true now"),
        ("method.blocks=[0]", "method.blocks: null in the run, [0] now"),
        ("method.init=gaussian", 'method.init: true in the run, "gaussian" now'),
        ("flow.min_sigma=0.1", "flow.min_sigma: 0.0 in the run, 0.1 now"),
        ("flow.loss.kind=huber", 'flow.loss.kind: "mse" in the run, "huber" now'),
        ("flow.input_perturbation=0.1", "flow.input_perturbation: null in the run, 0.1 now"),
        ("flow.noise_offset=0.1", "flow.noise_offset: 0.0 in the run, 0.1 now"),
        ("flow.shift=resolution", 'flow.shift: 1.0 in the run, "by resolution, 3 at 1024 px" now'),
        ("ema={decay: 0.9}", 'ema: null in the run, {"decay": 0.9} now'),
        ("model.max_sequence_length=20", "model.max_sequence_length: 16 in the run, 20 now"),
        ("model.dtype=bf16", 'model.dtype: "fp32" in the run, "bf16" now'),
        ("model.base=tiny-sd3", "model.base: not the same weights of the base as in the run"),
        ("data.resolution=80", "data.resolution: 64 in the run, 80 now"),
        ("data.flip=true", "data.images: not the same images, sizes, crops, flips and repeats as in the run"),
        ("data.sources.0.repeats=2", "data.images: "),
    ],
)
def test_a_key_that_changes_the_maths_is_refused_and_named(
    quick_config, pausing: Path, override: str, line: str
) -> None:
    before = files_of(pausing)
    with pytest.raises(RunError) as caught:
        run_training(quick_config(pausing, *COSINE, override), resume=True)
    assert any(problem.startswith(f"--resume: {line}") for problem in caught.value.problems)
    assert files_of(pausing) == before


def test_another_caption_or_image_is_refused(quick_config, write_images, tmp_path: Path) -> None:
    pictures = write_images(tmp_path / "pictures", 3)
    config = quick_config(tmp_path / "run", *COSINE, f"data.sources=[{{path: {pictures}}}]")
    stopped(config, 2)
    (pictures / "1.txt").write_text("a quite different caption")
    with pytest.raises(RunError) as caught:
        run_training(config, resume=True)
    assert [line.split(":")[1] for line in caught.value.problems[:-1]] == [" data.captions"]
    write_images(pictures, 3)
    shutil.copy(pictures / "2.png", pictures / "0.png")
    with pytest.raises(RunError) as caught:
        run_training(config, resume=True)
    assert [line.split(":")[1] for line in caught.value.problems[:-1]] == [" data.images"]
    write_images(pictures, 3)
    run_training(config, resume=True)


def test_a_run_that_ignored_a_colour_profile_is_refused_with_the_reason(
    quick_config, write_images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, store = write_images(tmp_path / "pictures", 3), tmp_path / "store"
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"rXYZ", b"xxxx")
    swapped = swapped.replace(b"gXYZ", b"rXYZ").replace(b"xxxx", b"gXYZ")
    Image.open(pictures / "1.png").save(pictures / "1.png", icc_profile=swapped)
    config = quick_config(tmp_path / "run", *COSINE, f"data.sources=[{{path: {pictures}}}]", f"data.cache_dir={store}")
    with monkeypatch.context() as earlier:
        earlier.setattr("sd3tune.data.colour._converted", lambda *_: None)
        stopped(config, 2)
    content = json.loads((store / "manifest.json").read_text())
    del content["readings"]
    (store / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(RunError) as caught:
        run_training(config, resume=True)
    reason, way_out = caught.value.problems
    assert reason.startswith("--resume: data.images: colour profiles (and the range of 32-bit greys) were ignored in")
    assert reason.endswith("which changes 1.png")
    assert "start a new run" in way_out


@pytest.mark.parametrize(
    "override",
    ["train.log_every=2", "checkpoint.every=1", "preview.every=7", "preview.guidance=2", "name=other", "flow.shift=1"],
)
def test_what_leaves_the_maths_alone_may_change(quick_config, pausing: Path, tmp_path: Path, override: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(pausing, run)
    run_training(quick_config(run, *COSINE, override), resume=True)
    assert (run / "adapter").is_dir()


def test_a_damaged_checkpoint_is_named_and_the_one_before_still_serves(
    quick_config, tmp_path: Path, straight: Path, assert_equal_runs
) -> None:
    config = quick_config(tmp_path, *EVERYTHING)
    stopped(config, 7)
    damaged = tmp_path / "checkpoints" / "step-000006"
    (damaged / "state.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"step-000006: damaged .* delete this folder"):
        run_training(config, resume=True)
    shutil.rmtree(damaged)
    run_training(config, resume=True)
    assert_equal_runs(straight, tmp_path)

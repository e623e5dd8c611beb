"""The launch forms, each as a user types it, and runs in two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd3tune import __version__
from sd3tune.commands.train import run_training
from sd3tune.config import dump_config
from sd3tune.errors import RunError
from sd3tune.run.folder import locked
from sd3tune.runtime.launch import _PROGRAM, _on_gpus, relaunch, without_option
from tests.runtime.two_processes import OPTIMIZERS_OF_LIBRARIES

ROOT = Path(__file__).parents[2]
ACCELERATE = (str(Path(sys.executable).with_name("accelerate")), "launch")
LOOKING = ("train.steps=2", "ema={decay: 0.8}", "validation={holdout: 2, every: 1}", "optimizer.lr=1e-3")
DRIVER = Path(__file__).with_name("two_processes.py")


@pytest.fixture
def write_config(quick_config, tmp_path: Path):
    """`write_config(name, "key=value", ...)`: a YAML file whose run folder is its name without `.yaml`."""

    def write(name: str, *overrides: str) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump_config(quick_config(tmp_path / name, *overrides)))
        return file

    return write


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """A folder of modules with the names of others, which leave a trace when they are imported."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name in ("typer", "torch", "json", "yaml", "accelerate", "sd3tune", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'imported')!r}, 'a').write(__name__)\n")
    return folder


def finish(process) -> tuple[str, str]:
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed, errors


def described(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


@pytest.mark.parametrize("program", [["sd3tune"], pytest.param(["-m", "sd3tune"], marks=pytest.mark.long)])
def test_accelerate_launches_the_folder_and_the_module(
    program: list[str], quick_config, write_config, tmp_path: Path, assert_equal_runs, start_cli, monkeypatch
) -> None:
    """From the repository's root, where `sd3tune` is a folder."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # no accelerate configuration of this machine's user
    settings = ("train.steps=2", "ema={decay: 0.5}")
    process = start_cli(*program, "train", write_config("launched", *settings), prefix=ACCELERATE, cwd=ROOT)
    run_training(quick_config(tmp_path / "here", *settings))
    printed, _ = finish(process)
    assert f"sd3tune infer --lora {tmp_path / 'launched'}" in printed
    assert described(tmp_path / "launched")["world_size"] == 1
    assert_equal_runs(tmp_path / "here", tmp_path / "launched")


@pytest.mark.long
def test_processes_that_accelerate_would_let_train_alone_are_refused(
    write_config, tmp_path: Path, start_cli, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch = (*ACCELERATE, "--multi_gpu", "--num_processes", "2")
    process = start_cli("-m", "sd3tune", "train", write_config("run"), prefix=launch, cwd=ROOT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "error: WORLD_SIZE=2: accelerate sets up one process where torch finds no GPU; " in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_two_processes_equal_one_with_twice_the_batch(
    quick_config, write_config, tmp_path: Path, lines_of, adapter_of, start_cli
) -> None:
    settings = (
        "train.steps=null", "train.epochs=3", "train.gradient_accumulation=2", "optimizer.lr=1e-3", "data.flip=true",
        "data.caption_dropout=0.3", "data.encoder_dropout=0.2",
        "data.sources.0.prior={prompt: a two, images: 4, steps: 2, weight: 0.5}",
    )  # fmt: skip
    file = write_config("two", *settings)
    process = start_cli("train", file, "--num-processes", "2")
    run_training(quick_config(tmp_path / "one", *settings, "train.batch_size=2"))
    printed, _ = finish(process)
    assert "on cpu, 2 processes" in printed
    assert "buckets   80x48: 4, 64x64: 1" in printed
    assert "steps     4 x 4 images, 3.2 epochs: each image is seen 3 to 4 times" in printed
    assert printed.count("sd3tune infer --lora") == 1

    assert described(tmp_path / "two")["world_size"] == 2
    assert described(tmp_path / "one")["world_size"] == 1
    for one, two in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert two["step"] == one["step"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["prior_loss"] == pytest.approx(one["prior_loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert two["loss_by_sigma"] == pytest.approx(one["loss_by_sigma"], rel=1e-5)
    one, two = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    "libraries", [OPTIMIZERS_OF_LIBRARIES[:2], pytest.param(OPTIMIZERS_OF_LIBRARIES, marks=pytest.mark.long)]
)
def test_two_processes_resume_as_if_never_stopped_and_agree_on_the_optimizer(
    libraries: tuple[str, ...],
    quick_config,
    scratch_config,
    write_config,
    tmp_path: Path,
    assert_equal_runs,
    lines_of,
    start_cli,
    adapter_of,
    monkeypatch,
) -> None:
    settings = (
        "train.steps=7", "train.gradient_accumulation=2", "data.crop_variants=2", "data.flip=true",
        "ema={decay: 0.8}", "checkpoint={every: 2, keep: 2}", "schedule.warmup_steps=2",
    )  # fmt: skip
    write_config("straight", *settings)
    write_config("stopped", *settings)
    prodigy = (
        "train.steps=6",
        "optimizer={kind: prodigy, d0: 1.0e-5, use_bias_correction: false}",
        "train.gradient_accumulation=2",
    )
    write_config("prodigy", *prodigy)
    (tmp_path / "scratch.yaml").write_text(dump_config(scratch_config(tmp_path / "scratch", *LOOKING)))
    for kind in libraries:
        write_config(kind, f"optimizer={{kind: {kind}}}", "train.steps=3", "ema={decay: 0.8}")
    write_config("broken", "optimizer={kind: adamw8bit, lr: 0.01}", "train.steps=2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    prefix = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    printed, _ = finish(start_cli(DRIVER, tmp_path, prefix=prefix))
    assert printed.count("resuming from step-000002") == printed.count("resuming from step-000005") == 1
    assert_equal_runs(tmp_path / "straight", tmp_path / "stopped")
    assert described(tmp_path / "stopped")["resumes"] == [{"from_step": 2}, {"from_step": 5}]
    assert described(tmp_path / "stopped")["world_size"] == 2

    exports = (tmp_path / "exports-0.txt").read_text().split()
    assert exports.count("straight/adapter") == exports.count("straight/adapter_raw") == 1
    assert (tmp_path / "exports-1.txt").read_text() == ""

    with pytest.raises(RunError, match="--resume: processes: 2 in the run, 1 now"):
        run_training(quick_config(tmp_path / "stopped", *settings, "train.steps=8"), resume=True)

    for name in ("prodigy", *libraries, "scratch", "broken"):
        one, other = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(one[key], tensor) for key, tensor in other.items())

    run_training(quick_config(tmp_path / "alone", *prodigy, "train.batch_size=2"))
    last = Path("checkpoints", "step-000006", "state.safetensors")
    run_training(scratch_config(tmp_path / "new", *LOOKING, "train.batch_size=2"))
    for name in ("metrics.jsonl", "validation.jsonl"):
        new, two = (lines_of(tmp_path / run, name) for run in ("new", "scratch"))
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in new], rel=1e-4)
    alone, both = load_file(tmp_path / "alone" / last), load_file(tmp_path / "prodigy" / last)
    for kind in libraries:
        settings = (f"optimizer={{kind: {kind}}}", "train.steps=3", "ema={decay: 0.8}", "train.batch_size=2")
        run_training(quick_config(tmp_path / f"{kind}-alone", *settings))
        one, two = adapter_of(tmp_path / f"{kind}-alone"), adapter_of(tmp_path / kind)
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-4, msg=f"{kind}, {key}")
    assert alone["optimizer.d"].item() > 1e-4
    assert both["optimizer.d"].item() == pytest.approx(alone["optimizer.d"].item(), rel=1e-3)

    assert "warning: optimizer.kind: adamw8bit does not work here (it failed in process 1)" in printed
    used = {"asked": "adamw8bit", "used": "adamw", "reason": "it failed in process 1"}
    assert described(tmp_path / "broken")["optimizer"] == used


def test_the_console_script_exits_with_2_and_one_line(write_config, tmp_path: Path, start_cli) -> None:
    process = start_cli("train", write_config("run"), "trian.steps=4", "--num-processes", "2")
    printed, errors = process.communicate()
    assert process.returncode == 2
    assert printed == ""
    (line,) = errors.splitlines()
    assert line.startswith("error: override trian.steps=4: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_one_ranks_problem_is_told_once_and_without_a_traceback(
    write_config, tmp_path: Path, hostile_folder: Path, start_cli, monkeypatch
) -> None:
    """Rank 0 alone learns that the folder is in use, while the other waits for it. Both need the base first.

    Neither imports what lies in the working directory.
    """
    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path / "cache"))
    with locked(tmp_path / "run"):
        process = start_cli("train", write_config("run"), "--num-processes", "2", cwd=hostile_folder)
        _, errors = process.communicate()
    assert process.returncode == 2
    problems = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert problems == [
        f"error: {tmp_path / 'run'}: another process is training here; wait for it or choose another output_dir"
    ]
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "run.json").exists()
    (base,) = (tmp_path / "cache" / "bases").glob("tiny*/")
    assert (base / "text_encoder" / "model.safetensors").is_file()  # transformers writes in rank 0 alone
    assert not (hostile_folder / "imported").exists()


@pytest.mark.parametrize("safe_path", [False, True])
def test_the_program_imports_nothing_from_the_working_directory(hostile_folder: Path, start_cli, safe_path) -> None:
    """Started by its path, with Python's safe-path mode and, as before Python 3.11, without."""
    prefix = (sys.executable, *["-P"] * (safe_path and sys.version_info >= (3, 11)), str(_PROGRAM))
    printed, _ = finish(start_cli("--version", prefix=prefix, cwd=hostile_folder))
    assert printed == f"sd3tune {__version__}\n"
    assert not (hostile_folder / "imported").exists()


@pytest.mark.long
def test_neither_does_the_launcher_for_gpus(hostile_folder: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # no accelerate configuration of this machine's user
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(hostile_folder)
    assert _on_gpus(2, [str(_PROGRAM), "--version"]) == 0
    assert capfd.readouterr().out == f"sd3tune {__version__}\n" * 2
    assert not (hostile_folder / "imported").exists()


def test_a_launched_process_does_not_launch_again(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="started by a launcher already"):
        relaunch(2, ["train", "c.yaml"])


@pytest.mark.parametrize("option", [["--num-processes", "2"], ["--num-processes=2"]])
def test_the_option_is_taken_out_wherever_it_stands(option: list[str]) -> None:
    for arguments in (
        ["train", *option, "c.yaml", "train.steps=2"],
        ["train", "c.yaml", "train.steps=2", *option],
        ["train", "c.yaml", *option, "train.steps=2"],
    ):
        assert without_option(arguments) == ["train", "c.yaml", "train.steps=2"]

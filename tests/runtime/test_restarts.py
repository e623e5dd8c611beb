"""Processes that die or hang: torch's launcher starts them again, and the training goes on from its last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from sd3tune.config import dump_config
from sd3tune.config.run_folder import RUN_FILE
from sd3tune.run.folder import continues_launch, describe_run
from sd3tune.runtime.environment import continues, launch_names
from sd3tune.runtime.launch import without_option

ELASTIC = {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RUN_ID": "job-1"}
SETTINGS = ("train.steps=40", "checkpoint={every: 4, keep: 1}", "train.process_timeout=0.25")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_a_restarted_process_continues_what_its_own_launch_began(tmp_path: Path, monkeypatch) -> None:
    for name, value in ELASTIC.items():
        monkeypatch.setenv(name, value)
    assert not continues_launch(tmp_path)
    describe_run(tmp_path, {}, 0)
    assert continues_launch(tmp_path), "the same agent, which may not have counted the restart"
    (agent, job), again = launch_names(ELASTIC), {**ELASTIC, "TORCHELASTIC_RESTART_COUNT": "1"}
    assert continues(["another agent", job], again)
    assert not continues(["another agent", job], ELASTIC), "the name of an earlier job"
    assert not continues(["another agent", "another job"], again)
    assert not continues(None, again)
    assert agent != job


def test_a_launch_without_restarts_is_not_recorded(tmp_path: Path) -> None:
    assert launch_names({}) == launch_names({**ELASTIC, "TORCHELASTIC_MAX_RESTARTS": "0"}) == []
    assert len(launch_names({**ELASTIC, "TORCHELASTIC_RUN_ID": "none"})) == 1
    describe_run(tmp_path, {}, 0)
    assert "launch" not in json.loads((tmp_path / RUN_FILE).read_text())


def test_restarts_need_several_processes(command, tmp_path: Path) -> None:
    assert command("train", tmp_path / "c.yaml", "--restarts", "2").err == (
        "error: --restarts 2: only for several processes; give --num-processes, too\n"
    )
    assert without_option(["train", "--restarts", "2", "c.yaml", "--restarts=3"], "--restarts") == ["train", "c.yaml"]


def rank_of(file: Path, rank: int) -> int:
    """The process of a rank that trains `file`."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(file).encode() in words and f"RANK={rank}".encode() in environment:
            return int(process.name)
    raise AssertionError("no such process")


def after_a_checkpoint(run: Path) -> None:
    end = time.monotonic() + 200
    while not list(run.glob("checkpoints/step-*")):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.long
def test_a_killed_rank_and_a_stopped_one_cost_only_the_steps_since_the_last_checkpoint(
    quick_config, tmp_path: Path, start_cli, assert_equal_runs, monkeypatch
) -> None:
    """Rank 1 is killed, in a launch by --restarts; rank 0, which writes, is stopped, in one by torchrun."""
    files = {}
    for name in ("straight", "killed", "stopped"):
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(dump_config(quick_config(tmp_path / name, *SETTINGS)))
    straight = start_cli("train", files["straight"], "--num-processes", "2")
    assert straight.communicate(timeout=200)[0].count("resuming") == 0

    killed = start_cli("train", files["killed"], "--num-processes", "2", "--restarts", "1")
    after_a_checkpoint(tmp_path / "killed")
    os.kill(rank_of(files["killed"], 1), signal.SIGKILL)
    printed, errors = killed.communicate(timeout=200)
    assert killed.returncode == 0, errors
    assert printed.count("resuming from step-") == 1
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed")

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    prefix = (*TORCHRUN, "--max-restarts", "1", "-m", "sd3tune")
    stopped = start_cli("train", files["stopped"], prefix=prefix)
    after_a_checkpoint(tmp_path / "stopped")
    os.kill(rank_of(files["stopped"], 0), signal.SIGSTOP)
    printed, errors = stopped.communicate(timeout=300)
    assert stopped.returncode == 0, errors
    assert "warning: process 0 did not arrive for " in printed
    assert "error: process 1 of 2 waited for 0 longer than train.process_timeout (0.25 minutes): " in errors
    assert printed.count("resuming from step-") == 1
    assert_equal_runs(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.long
def test_a_run_that_was_there_before_is_refused_however_often_the_launcher_tries(
    quick_config, tmp_path: Path, start_cli
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(quick_config(tmp_path / "run", "train.steps=2")))
    first = start_cli("train", file, "--num-processes", "2", "--restarts", "1")
    first.communicate(timeout=200)
    assert first.returncode == 0
    again = start_cli("train", file, "--num-processes", "2", "--restarts", "1")
    _, errors = again.communicate(timeout=200)
    assert again.returncode == 2
    problems = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert problems == [
        f"error: {tmp_path / 'run'}: already holds a run (step 2); add --resume to go on, or choose another output_dir"
    ]

"""`sd3tune sweep`: trials, their processes, and a sweep that is stopped, killed or joined."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sd3tune.commands.sweep import run_sweep
from sd3tune.errors import ConfigError, Interrupted, RunError, UserError
from sd3tune.sweep.settings import read_sweep
from sd3tune.sweep.trials import Trials
from tests.forks import FORKS

AXES = {"optimizer.lr": [1e-4, 1e-3], "method.rank": [1, 2]}


def starts(run: Path) -> int:
    return len(run.with_suffix(".starts").read_text().splitlines())


def results(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


def until(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_grid_is_trained_and_compared(write_sweep, quick_training, tmp_path: Path, capfd) -> None:
    run_sweep(write_sweep("grid", axes=AXES, workers=2))
    printed = capfd.readouterr().out
    found = results(tmp_path / "grid")
    assert [trial["value"] for trial in found["trials"]] == [2.25, 1.75, 1.25, 0.75]
    assert found["best"] == "trial-0003"
    assert "trial-0003  0.001         2            0.75             4     complete" in printed
    assert f"sd3tune infer --lora {tmp_path / 'grid' / 'trial-0003'} --prompt" in printed
    page = (tmp_path / "grid" / "sweep.html").read_text()
    assert page.count("<circle") == 3 * 4
    assert "trial-0003: optimizer.lr=0.001 method.rank=2: 0.75" in page
    run_sweep(tmp_path / "grid.yaml")
    assert [starts(tmp_path / "grid" / f"trial-{number:04d}") for number in range(4)] == [1, 1, 1, 1]


def test_a_failed_trial_is_named_and_passed_over_up_to_a_limit(write_sweep, quick_training, tmp_path, capfd) -> None:
    axes = {"optimizer.lr": [1.0, 1e-3, 2.0, 1e-4]}
    run_sweep(write_sweep("some", axes=axes, max_failed=2))
    printed = capfd.readouterr().out
    assert "warning: trial-0000  optimizer.lr=1.0: failed: optimizer.lr: far too large" in printed
    assert [trial["state"] for trial in results(tmp_path / "some")["trials"]] == [
        "failed", "complete", "failed", "complete",
    ]  # fmt: skip
    with pytest.raises(RunError) as caught:
        run_sweep(write_sweep("none", axes=axes, max_failed=0))
    assert caught.value.problems == (
        "trial-0000 failed: optimizer.lr: far too large",
        f"{tmp_path / 'none.yaml'}:1: max_failed: 1 trials failed, and 0 may; correct the cause, and raise it to go on "
        "with the other trials",
    )


def test_a_figure_of_eval_is_compared_within_the_drift_limit(write_sweep, quick_training, tmp_path: Path) -> None:
    axes = {"optimizer.lr": [1e-4, 1e-3, 1e-2]}
    run_sweep(write_sweep("eval", "eval={}", axes=axes, objective="likeness"))
    found = results(tmp_path / "eval")
    assert found["direction"] == "maximize"
    assert found["best"] == "trial-0001"
    assert [trial["value"] for trial in found["trials"]] == [0.8, 0.9, None]
    assert found["trials"][2]["state"] == "pruned"
    assert found["trials"][2]["reason"] == "all weights drift beyond eval.drift_limit"


def test_bad_trials_are_stopped_early(write_sweep, quick_training, tmp_path: Path) -> None:
    axes = {"optimizer.lr": [1e-3, 2e-3, 1e-4, 3e-3], "seed": [10]}
    run_sweep(write_sweep("pruned", axes=axes, pruning={"after_trials": 2}))
    trials = results(tmp_path / "pruned")["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "complete", "pruned", "pruned"]
    assert trials[2]["value"] is None
    assert trials[2]["step"] < 4
    assert trials[2]["reason"].endswith(" is worse than the median")


def test_ctrl_c_leaves_a_sweep_that_continues(write_sweep, quick_training, tmp_path: Path) -> None:
    file = write_sweep("stopped", axes={"optimizer.lr": [1e-3, 2e-3], "seed": [20]})

    def interrupt() -> None:
        until((tmp_path / "stopped" / "trial-0000.starts").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted, match=r"stopped, [01] of 2 trials are done; .* continues"):
        run_sweep(file)
    assert not (tmp_path / "stopped" / "sweep.json").exists()
    run_sweep(file)
    assert [trial["state"] for trial in results(tmp_path / "stopped")["trials"]] == ["complete", "complete"]


@pytest.mark.long
def test_processes_share_the_trials_of_one_storage(write_sweep, quick_training, tmp_path: Path, monkeypatch) -> None:
    """One joins from a folder of its own, as another machine, and one from the same folder; all kinds of trial end."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    settings = {"axes": {"optimizer.lr": [1e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3], "seed": [5]}, "storage": url}
    here, there = write_sweep("here", **settings), write_sweep("there", **settings)
    with pytest.raises(ConfigError, match="--join: the storage has no sweep 'sweep'; start it first"):
        run_sweep(there, join=True)
    main = FORKS.Process(target=_quickly, args=(here, False, str(quick_training)))
    main.start()
    until((tmp_path / "here" / "trial-0000.starts").exists)
    with pytest.raises(RunError, match=f"{tmp_path / 'here'}: another process works on this sweep; to help it, add"):
        run_sweep(here)
    helpers = [FORKS.Process(target=_quickly, args=(file, True, str(quick_training))) for file in (here, there)]
    for process in helpers:
        process.start()
    for process in (main, *helpers):
        process.join(120)
        assert process.exitcode == 0
    begun = sorted(path.name for path in tmp_path.glob("*/trial-*.starts"))
    assert begun == [f"trial-{number:04d}.starts" for number in range(6)]
    assert all(starts(path.with_suffix("")) == 1 for path in tmp_path.glob("*/trial-*.starts"))
    run_sweep(here)
    assert [trial["state"] for trial in results(tmp_path / "here")["trials"]] == ["complete"] * 6


def _quickly(file: Path, join: bool, program: str) -> None:
    import sys

    import sd3tune.sweep.attempt
    import sd3tune.sweep.workers

    sd3tune.sweep.attempt.program = lambda: [sys.executable, program]
    sd3tune.sweep.workers._POLL = 0.02
    run_sweep(file, join=join)


def test_a_sweep_that_was_changed_is_refused_and_says_where(write_sweep, quick_training, tmp_path: Path) -> None:
    run_sweep(write_sweep("sweep", axes={"optimizer.lr": [1e-3]}))
    with pytest.raises(ConfigError) as caught:
        run_sweep(write_sweep("sweep", "train.steps=9", axes={"optimizer.lr": [1e-2]}, direction="maximize"))
    assert [line.partition("differs")[0] for line in caught.value.problems] == [
        f"{tmp_path / 'sweep.yaml'}:1: {key}: " for key in ("config", "axes", "direction")
    ]


@pytest.mark.parametrize(
    ("overrides", "settings", "problem"),
    [
        (
            (),
            {"axes": {"optimizer.lrr": [1.0]}},
            "axes.optimizer.lrr: optimizer.lrr=1.0: unknown key",
        ),
        ((), {"axes": {"method.rank": [4, -1]}}, "axes.method.rank: method.rank=-1: -1 is too small; at least 1"),
        (("validation.holdout=0",), {"axes": AXES}, "objective: validation_loss needs held-out images: set "),
        ((), {"axes": AXES, "objective": "likeness"}, "objective: likeness is measured on pictures: set eval: {} in "),
        (("hub={repo_id: a/b, push: end}",), {"axes": AXES}, "config: hub.push is end, and every trial would upload; "),
        ((), {"axes": AXES, "storage": "nonsense"}, "storage: the database cannot be used: Could not parse"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_anything_is_trained(
    write_sweep, quick_training, tmp_path: Path, overrides, settings, problem: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_sweep(write_sweep("sweep", *overrides, **settings))
    (line,) = caught.value.problems
    assert line.replace(".yaml:1: ", ".yaml: ").startswith(f"{tmp_path / 'sweep.yaml'}: {problem}")
    assert not list(tmp_path.glob("sweep/trial-*"))


def test_a_folder_that_the_storage_does_not_know_is_not_touched(write_sweep, quick_training, tmp_path: Path) -> None:
    (tmp_path / "sweep" / "trial-0000").mkdir(parents=True)
    file = write_sweep("sweep", axes=AXES)
    for _ in range(2):
        with pytest.raises(RunError, match="trial-0000: is there already, but the sweep's storage has no such trial"):
            run_sweep(file)


def test_the_plan_lists_the_trials_and_the_cost_of_one(write_sweep, tmp_path: Path, capfd) -> None:
    run_sweep(write_sweep("sweep", axes=AXES), dry_run=True)
    printed = capfd.readouterr().out
    assert "trial-0002  optimizer.lr=0.001 method.rank=1" in printed
    assert "cost      of trial-0000: 0." in printed
    assert not (tmp_path / "sweep").exists()


def test_a_killed_sweep_ends_its_trials_and_continues_to_the_table_of_one_never_killed(
    write_sweep, quick_training, tmp_path: Path
) -> None:
    axes = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "method.rank": [1, 2], "seed": [20]}
    settings = {"axes": axes, "sampler": "random", "trials": 5, "workers": 2}
    run_sweep(write_sweep("straight", **settings))
    file, folder = write_sweep("killed", **settings), tmp_path / "killed"
    sweep = FORKS.Process(target=_quickly, args=(file, False, str(quick_training)))
    sweep.start()
    until((folder / "trial-0002.starts").exists)
    sweep.kill()
    sweep.join()
    begun = [row.number for row in Trials(read_sweep(file), {}).rows() if row.state == "running"]
    assert begun
    run_sweep(file)
    assert (folder / "sweep.json").read_text() == (tmp_path / "straight" / "sweep.json").read_text()
    for number in range(5):  # one that was killed before it began, or at its end, is started once
        assert starts(folder / f"trial-{number:04d}") in ((1, 2) if number in begun else (1,))


@pytest.mark.long
def test_the_trainings_of_a_killed_sweep_save_and_end_and_it_continues_them(write_sweep, tmp_path, start_cli) -> None:
    """Three real trainings, two at once. Only the sweep's own process is killed."""
    axes, folder = {"optimizer.lr": [1e-3, 1e-2, 3e-2]}, tmp_path / "sweep"
    file = write_sweep("sweep", "train.steps=20", "checkpoint.every=4", "validation.every=50", axes=axes, workers=2)
    sweep = start_cli("sweep", file)
    until(lambda: list(folder.glob("trial-*/checkpoints/step-*")))
    sweep.send_signal(signal.SIGKILL)
    assert sweep.wait() == -signal.SIGKILL
    trials = Trials(read_sweep(file), {})
    assert [row.state for row in trials.rows()] == ["running", "running"]
    again = start_cli("sweep", file)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert [trial["state"] for trial in results(folder)["trials"]] == ["complete"] * 3
    described = [json.loads((folder / f"trial-{number:04d}" / "run.json").read_text()) for number in range(3)]
    assert any(one["resumes"] for one in described[:2])
    assert "stopped, saved at step-0000" in "".join(log.read_text() for log in folder.glob("logs/*.txt"))


def kill_all(sweep: subprocess.Popen[str], folder: Path) -> None:
    """Kill a sweep and its trainings, none of which can save."""
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    ours = str(folder).encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if ours in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def killed_and_continued(start_cli, file: Path, folder: Path, times: tuple[int, ...]) -> None:
    """Run a sweep, killed once so many trials have ended; then to its end."""
    for count in times:
        sweep = start_cli("sweep", file)
        begun = folder / f"trial-{count:04d}" / "metrics.jsonl"
        until(begun.exists, seconds=600)
        kill_all(sweep, folder)
    last = start_cli("sweep", file)
    _, errors = last.communicate(timeout=1200)
    assert last.returncode == 0, errors


NANO = ("model={base: nano}", "train.steps=12", "checkpoint.every=3", "validation={holdout: 2, every: 4}",
        "method={rank: 4, alpha: 4}")  # fmt: skip
RANGE = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "method.rank": [2, 4, 8]}


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"axes": {"optimizer.lr": [1e-4, 1e-3, 3e-3, 1e-2], "method.rank": [2, 4, 8]}},
        {"axes": RANGE, "sampler": "random", "trials": 12, "seed": 3},
    ],
    ids=["grid", "random"],
)
def test_twelve_nano_runs_killed_twice_end_with_the_table_of_a_sweep_never_killed(
    write_sweep, tmp_path: Path, start_cli, settings
) -> None:
    for name in ("straight", "killed"):
        write_sweep(name, *NANO, workers=2, **settings)
    killed_and_continued(start_cli, tmp_path / "straight.yaml", tmp_path / "straight", ())
    killed_and_continued(start_cli, tmp_path / "killed.yaml", tmp_path / "killed", (2, 7))
    straight, killed = ((tmp_path / name / "sweep.json").read_text() for name in ("straight", "killed"))
    assert killed == straight
    assert len(json.loads(killed)["trials"]) == 12


@pytest.mark.long
def test_tpe_with_pruning_loses_and_repeats_no_trial(write_sweep, tmp_path: Path, start_cli) -> None:
    file = write_sweep("tpe", *NANO, axes=RANGE, sampler="tpe", trials=12, workers=2, pruning={"after_trials": 3})
    killed_and_continued(start_cli, file, tmp_path / "tpe", (2, 7))
    trials = results(tmp_path / "tpe")["trials"]
    assert [trial["trial"] for trial in trials] == [f"trial-{number:04d}" for number in range(12)]
    assert {trial["state"] for trial in trials} <= {"complete", "pruned"}
    assert len({tuple(trial["overrides"]) for trial in trials}) == 12
    logs = [(tmp_path / "tpe" / "logs" / f"trial-{number:04d}.txt").read_text() for number in range(12)]
    assert sum(log.count("\nnext:\n") for log in logs) == sum(trial["state"] == "complete" for trial in trials)

"""The runs of this machine are listed with the state that their own files and locks have."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sd3tune.commands.train import run_training
from sd3tune.config.run_folder import read_run_file
from sd3tune.errors import Interrupted
from sd3tune.run.folder import locked
from sd3tune.run.listing import list_runs, remember_run, summarize_run

COMPAT = Path(__file__).parents[1] / "compat" / "written"


@pytest.fixture(autouse=True)
def _own_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other test's runs are on the list."""
    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path / "cache"))


def write_run(folder: Path, step: int = 7, saved: int | None = 5, **facts: object) -> Path:
    """A run folder of 20 steps, without weights."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"sd3tune_run": 1, "argv": [], "steps": 20, **facts}))
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {done}}}\n' for done in range(1, step + 1)))
    if saved is not None:
        (folder / "checkpoints" / f"step-{saved:06d}").mkdir(parents=True)
    return folder


def test_a_run_that_holds_its_lock_is_running_and_else_its_files_say_how_it_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    assert summarize_run(run).state == "failed"  # killed: steps 6 and 7 are lost
    with locked(run):
        assert summarize_run(run).state == "running"
    (run / "checkpoints" / "step-000007").mkdir()
    assert summarize_run(run).state == "stopped"
    failed = summarize_run(write_run(tmp_path / "b", ended={"state": "failed", "reason": "out of memory"}))
    assert (failed.state, failed.reason, failed.step, failed.steps, failed.saved) == (
        "failed", "out of memory", 7, 20, 5,
    )  # fmt: skip
    assert summarize_run(write_run(tmp_path / "c", report={})).state == "finished"


def test_looking_at_a_run_does_not_keep_a_training_from_starting(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / ".lock").touch()
    script = "import sys, pathlib; from sd3tune.run.listing import is_running\n"
    script += "print('on', flush=True)\nwhile True: is_running(pathlib.Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, text=True) as looking:
        assert looking.stdout is not None
        assert looking.stdout.readline() == "on\n"
        try:
            for _ in range(20):
                with locked(run):
                    pass
        finally:
            looking.kill()


def test_runs_are_found_below_folders_and_wherever_they_began(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs" / name) for name in ("a", "demo/lora", "x/y/z/too-deep", ".trash/old")][:2]
    elsewhere = write_run(tmp_path / "elsewhere" / "über")
    for run in (*runs, elsewhere, elsewhere):
        remember_run(run)
    assert len((tmp_path / "cache" / "runs.txt").read_text().splitlines()) == 3
    assert {run.folder for run in list_runs([tmp_path / "runs"])} == {*runs, elsewhere}
    assert {run.folder for run in list_runs([tmp_path / "runs"], everywhere=False)} == {*runs}
    shutil.rmtree(elsewhere)
    assert {run.folder for run in list_runs([])} == {*runs}
    assert list_runs([tmp_path / "missing"], everywhere=False) == []


def test_damaged_and_unfinished_files_count_as_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    (run / "validation.jsonl").write_text(
        '{"step": 0, "loss": 2.0}\n{"step": 5, "loss": 1.5}\n{"step": 7, "loss": null}\n'
    )
    found = summarize_run(run)
    assert (found.step, found.steps, found.best_loss, found.best_step) == (7, None, 1.5, 5)
    (run / "metrics.jsonl").write_text("\x00")
    (run / "validation.jsonl").write_text("nothing\n")
    (run / "config.yaml").write_text("train: 3")
    found = summarize_run(run)
    assert (found.step, found.steps, found.best_loss) == (5, None, None)


def test_a_run_of_an_earlier_version_is_listed(tmp_path: Path) -> None:
    run = Path(shutil.copytree(COMPAT / "lora", tmp_path / "lora"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("{here}", str(tmp_path)))
    found = summarize_run(run)
    assert (found.state, found.step, found.steps, found.saved) == ("finished", 6, 6, 6)
    assert found.best_loss is not None


def test_listing_imports_no_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, sd3tune.run.listing; sys.exit('torch' in sys.modules)"], check=True
    )


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [(KeyboardInterrupt(), "stopped", None), (ValueError("no such\nthing"), "failed", "ValueError: no such thing")],
)
def test_a_run_records_how_it_ended_until_it_is_resumed(
    quick_config, tmp_path: Path, error: BaseException, state: str, reason: str | None
) -> None:
    def fail(view) -> None:
        if view.step == 2:
            raise error

    config = quick_config(tmp_path / "run", "checkpoint.every=1", "data.resolution=32")
    with pytest.raises((Interrupted, ValueError), match=r"stopped|no such"):
        run_training(config, callbacks=[fail])
    assert [(run.state, run.step, run.steps, run.reason) for run in list_runs([])] == [(state, 2, 3, reason)]
    run_training(config, resume=True)
    assert "ended" not in read_run_file(tmp_path / "run")
    assert summarize_run(tmp_path / "run").state == "finished"

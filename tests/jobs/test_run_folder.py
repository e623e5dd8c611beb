"""Who may write to a run folder, where a run starts, and what `run.json` remembers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sd3tune.errors import RunError
from sd3tune.jobs import run_folder
from sd3tune.jobs.run_folder import check_start, clear, describe_run, is_finished, locked, starting_checkpoint
from sd3tune.methods import LoraMethod
from sd3tune.model.adapter_io import ADAPTER_FILE


def write_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "identity": {}, "layout": {}}))
    return folder


def write_adapter(run: Path) -> None:
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / ADAPTER_FILE).write_bytes(b"")


def write_closing(run: Path, **facts: object) -> None:
    (run / "run.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("resume", [True, False])
def test_an_absent_or_empty_folder_is_a_fresh_start(tmp_path: Path, resume: bool) -> None:
    assert starting_checkpoint(tmp_path / "absent", resume) is None
    assert starting_checkpoint(tmp_path, resume) is None


@pytest.mark.parametrize("resume", [True, False])
def test_an_attempt_that_saved_nothing_may_be_repeated(tmp_path: Path, resume: bool) -> None:
    with locked(tmp_path):
        pass
    assert starting_checkpoint(tmp_path, resume) is None  # it got no further than the lock
    describe_run(tmp_path, {}, 0)
    (tmp_path / "metrics.jsonl").write_text("")
    assert starting_checkpoint(tmp_path, resume) is None


def test_one_that_was_killed_at_its_first_file_may_be_repeated(tmp_path: Path) -> None:
    (tmp_path / ".tmp-7-run.json").write_text("{")
    assert starting_checkpoint(tmp_path, resume=True) is None


@pytest.mark.parametrize("saved", [True, False])
def test_what_an_attempt_measured_and_drew_is_forgotten_when_it_saved_nothing(tmp_path: Path, saved: bool) -> None:
    start = write_checkpoint(tmp_path, 5) if saved else None
    made = [tmp_path / name for name in ("validation.jsonl", "samples/base-0.png", "best/validation.json")]
    for path in [*made, tmp_path / ".tmp-7-README.md"]:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    clear(tmp_path, start)
    assert [path.exists() for path in made] == [saved] * 3
    assert not (tmp_path / ".tmp-7-README.md").exists()


def test_resuming_starts_from_the_newest_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    newest = write_checkpoint(tmp_path, 10)
    assert starting_checkpoint(tmp_path, resume=True) == newest


def test_a_run_is_not_trained_over(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    with pytest.raises(RunError, match=r"already holds a run \(step 10\); add --resume"):
        starting_checkpoint(tmp_path, resume=False)


@pytest.mark.parametrize("resume", [True, False])
def test_an_adapter_is_not_written_over(tmp_path: Path, resume: bool) -> None:
    write_adapter(tmp_path)
    with pytest.raises(RunError, match="already holds an adapter"):
        starting_checkpoint(tmp_path, resume)


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(RunError, match="not empty and not a run folder"):
        starting_checkpoint(tmp_path, resume)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="is a file"):
        starting_checkpoint(tmp_path / "run", resume=True)


def test_a_run_is_finished_when_its_closing_report_is_written(tmp_path: Path) -> None:
    assert not is_finished(tmp_path, LoraMethod.product, 10)
    write_checkpoint(tmp_path, 10)
    assert not is_finished(tmp_path, LoraMethod.product, 10)
    write_adapter(tmp_path)
    write_closing(tmp_path, seed=0)
    assert not is_finished(tmp_path, LoraMethod.product, 10)  # an adapter may be from before the run was extended
    write_closing(tmp_path, seed=0, report={})
    assert is_finished(tmp_path, LoraMethod.product, 10)
    assert is_finished(tmp_path, LoraMethod.product, 8)
    (tmp_path / "run.json").write_text("{")
    assert not is_finished(tmp_path, LoraMethod.product, 10)
    write_closing(tmp_path, report={})
    assert not is_finished(tmp_path, LoraMethod.product, 11)


def test_the_folder_is_held_against_other_processes_and_then_released(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    with locked(run), pytest.raises(RunError, match="another process is training here"), locked(run):
        pass
    script = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(run / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is training here"), locked(run):
            pass
        other.kill()
    with locked(run):
        pass


def test_a_run_that_went_on_meanwhile_is_noticed(tmp_path: Path) -> None:
    check_start(tmp_path, None)
    first = write_checkpoint(tmp_path, 5)
    check_start(tmp_path, first)
    with pytest.raises(RunError, match="another process trained here"):
        check_start(tmp_path, None)
    write_checkpoint(tmp_path, 10)
    with pytest.raises(RunError, match="another process trained here"):
        check_start(tmp_path, first)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"output_dir: .* cannot be written to"), locked(tmp_path / "file" / "run"):
        pass


def test_each_resume_is_remembered(tmp_path: Path) -> None:
    describe_run(tmp_path, {"seed": 3}, 0)
    describe_run(tmp_path, {"seed": 3}, 4)
    described = describe_run(tmp_path, {"seed": 3}, 8)
    assert described["resumes"] == [{"from_step": 4}, {"from_step": 8}]
    assert json.loads((tmp_path / "run.json").read_text()) == described
    assert described["argv"] == sys.argv


def test_a_fresh_start_forgets_an_attempt_that_saved_nothing(tmp_path: Path) -> None:
    describe_run(tmp_path, {}, 0)
    assert describe_run(tmp_path, {}, 0)["resumes"] == []


@pytest.mark.parametrize("tracked", [True, False])
def test_the_commit_is_of_the_repository_that_tracks_the_program(tmp_path: Path, tracked: bool, monkeypatch) -> None:
    """A virtual environment lies in the repository of whatever it was made for."""
    package = tmp_path / ".venv" / "lib" / "sd3tune"
    (package / "jobs").mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "__init__.py").touch()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.email=a@b", "-c", "user.name=c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "__init__.py", *[".venv"] * tracked)
    git("commit", "-q", "-m", "private")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook of that repository
    monkeypatch.setattr(run_folder, "__file__", str(package / "jobs" / "run_folder.py"))
    assert describe_run(tmp_path, {}, 0)["git_commit"] == (git("rev-parse", "HEAD") if tracked else None)

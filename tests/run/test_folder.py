"""Who may write to a run folder, where a run starts, and what `run.json` remembers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sd3tune.adapter.file import ADAPTER_FILE
from sd3tune.errors import RunError
from sd3tune.methods import LoraMethod
from sd3tune.run import folder as run_folder
from sd3tune.run.callbacks.validation import describe
from sd3tune.run.folder import (
    check_still_newest,
    clear,
    describe_run,
    is_finished,
    locked,
    read_validation,
    starting_checkpoint,
)


def write_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "identity": {}, "layout": {}}))
    return folder


def write_adapter(run: Path) -> None:
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / ADAPTER_FILE).write_bytes(b"")


def write_closing(run: Path, **facts: object) -> None:
    (run / "run.json").write_text(json.dumps({"sd3tune_run": 1, **facts}))


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


FOREIGN = [
    {"tool": "other"}, {"argv": ["train.py"], "seed": 1, "timings": {}}, {"sd3tune_run": "1"}, [], "sd3tune_run", None,
]  # fmt: skip


@pytest.mark.parametrize("described", [*map(json.dumps, FOREIGN), "{", "[" * 100_000, ""])
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_json_of_another_program_makes_no_run_folder(tmp_path: Path, described: str, resume: bool) -> None:
    (tmp_path / "run.json").write_text(described)
    with pytest.raises(RunError, match="not empty and not a run folder"):
        starting_checkpoint(tmp_path, resume)
    write_checkpoint(tmp_path, 5)
    with pytest.raises(
        RunError, match=r"run\.json: damaged, or of another program; move it" if resume else "add --resume"
    ):
        starting_checkpoint(tmp_path, resume)


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_json_without_the_marker_is_known_by_its_keys(tmp_path: Path, resume: bool) -> None:
    before = {"versions": {}, "argv": [], "resumes": [], "timings": {}, "warnings": ["\udcff.png: small"]}
    (tmp_path / "run.json").write_text(json.dumps(before))
    assert starting_checkpoint(tmp_path, resume) is None


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_of_a_newer_version_is_left_alone(tmp_path: Path, resume: bool) -> None:
    write_checkpoint(tmp_path, 5)
    write_closing(tmp_path, sd3tune_run=2, argv=[])
    with pytest.raises(RunError, match="written by a newer sd3tune; upgrade this one"):
        starting_checkpoint(tmp_path, resume)


def test_only_names_of_a_run_are_removed_and_no_links_followed(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    ours = (
        "validation.jsonl", "samples/base-0.png", "samples/step-000010-2.png", "samples/over_time.png",
        "best/validation.json", f"best/adapter/{ADAPTER_FILE}", "best/model/transformer/config.json",
        "best/model/model_index.json", "logs/wandb_id", "logs/tensorboard/events.out.tfevents.1700000000",
        "logs/wandb/debug.log", "logs/wandb/offline-run-20260102_030405-0a1b2c3d/files/config.yaml",
    )  # fmt: skip
    others = (
        "logs/thesis.log", "logs/tensorboard/events.out.tfevents.1700000000.host", "logs/wandb/notes.txt",
        "samples/mine.png", "samples/base-0.png.txt", "samples/more/base-0.png", "best/model.txt",
        "best/adapter/my.txt", "validation.jsonl.bak", ".tmp-notes", ".tmp-work/file", "README.md", "metrics.jsonl",
    )  # fmt: skip
    for name in (*ours, *others):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("precious")
    for name in ("samples", "tensorboard"):
        (elsewhere / name).mkdir(parents=True)
    (elsewhere / "samples" / "base-1.png").write_text("precious")
    (elsewhere / "tensorboard" / "events.out.tfevents.1").write_text("precious")
    (run / "samples" / "base-1.png").symlink_to(elsewhere / "samples" / "base-1.png")
    (run / "logs" / "wandb" / "run-20260102_030405-0a1b2c3d").symlink_to(elsewhere / "samples")
    clear(run, None)
    left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert left == {*others, "samples/base-1.png"}
    assert (run / "logs" / "wandb" / "run-20260102_030405-0a1b2c3d").is_symlink()
    assert len([path for path in elsewhere.rglob("*") if path.is_file()]) == 2


@pytest.mark.parametrize("name", ["samples", "logs", "best"])
def test_empty_folders_and_files_of_these_names_do_no_harm(tmp_path: Path, name: str) -> None:
    describe_run(tmp_path, {}, 0)
    (tmp_path / name).mkdir()
    assert starting_checkpoint(tmp_path, resume=False) is None
    clear(tmp_path, None)
    (tmp_path / name).rmdir()
    (tmp_path / name).touch()
    clear(tmp_path, None)
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["samples", "logs", "best", "validation.jsonl"])
def test_a_fresh_start_removes_nothing_through_a_link(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    describe_run(run, {}, 0)
    (run / name).symlink_to(tmp_path)
    with pytest.raises(RunError, match=f"{name}: a link, and nothing is removed through links"):
        starting_checkpoint(run, resume=False)
    write_checkpoint(run, 5)
    if name != "validation.jsonl":
        assert starting_checkpoint(run, resume=True) is not None


def test_a_fresh_start_does_not_replace_what_somebody_put_beside_the_best_weights(tmp_path: Path) -> None:
    describe_run(tmp_path, {}, 0)
    (tmp_path / "best" / "adapter").mkdir(parents=True)
    (tmp_path / "best" / "adapter" / ADAPTER_FILE).touch()
    (tmp_path / "best" / ".DS_Store").touch()
    assert starting_checkpoint(tmp_path, resume=False) is None
    (tmp_path / "best" / "notes.txt").touch()
    with pytest.raises(RunError, match=r"best/notes\.txt: not written by the run"):
        starting_checkpoint(tmp_path, resume=False)


def test_temporary_names_of_other_programs_make_a_folder_theirs(tmp_path: Path) -> None:
    (tmp_path / ".tmp-work").mkdir()
    with pytest.raises(RunError, match="not empty and not a run folder"):
        starting_checkpoint(tmp_path, resume=False)


MEASURED = {
    "step": 0, "images": 1, "weights": "raw", "loss": 1.0, "loss_by_sigma": {"0.0-0.2": 1.0}, "base_loss": 2.0,
    "base_loss_by_sigma": {"0.0-0.2": 2.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"step": None}, "step: not a whole number"),
        ({"images": "1"}, "images: not a number"),
        ({"base_loss": "low"}, "base_loss: not a number"),
        ({"loss_by_sigma": 1.0}, "loss_by_sigma: not the losses"),
        ({"base_loss_by_sigma": {}}, "loss_by_sigma: not the losses"),
        ({"loss_by_sigma": {"0.0-0.2": "low"}}, "loss_by_sigma: not a number"),
    ],
)
def test_edited_measurements_are_named_before_a_run_is_resumed(tmp_path: Path, changed: dict, reason: str) -> None:
    write_checkpoint(tmp_path, 5)
    (tmp_path / "validation.jsonl").write_text(json.dumps(MEASURED) + "\n")
    assert starting_checkpoint(tmp_path, resume=True) is not None
    (tmp_path / "validation.jsonl").write_text(json.dumps(MEASURED | changed) + "\n")
    with pytest.raises(RunError, match=rf"validation\.jsonl:1: {reason}"):
        starting_checkpoint(tmp_path, resume=True)
    (tmp_path / "validation.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match=r"validation\.jsonl:1: step: not a whole number"):
        starting_checkpoint(tmp_path, resume=True)


@pytest.mark.parametrize("base", [None, 0.0])
def test_a_base_without_a_loss_is_no_mistake(tmp_path: Path, base: float | None) -> None:
    """As a run may have measured it: not finite, or exactly 0."""
    (tmp_path / "validation.jsonl").write_text(json.dumps(MEASURED | {"base_loss": base}) + "\n")
    (line,) = read_validation(tmp_path)
    assert describe(line) == "step 0: loss 1.0000 on 1 held-out image, no comparison against the base"


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
    check_still_newest(tmp_path, None)
    first = write_checkpoint(tmp_path, 5)
    check_still_newest(tmp_path, first)
    with pytest.raises(RunError, match="another process trained here"):
        check_still_newest(tmp_path, None)
    write_checkpoint(tmp_path, 10)
    with pytest.raises(RunError, match="another process trained here"):
        check_still_newest(tmp_path, first)


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
    (package / "run").mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "__init__.py").touch()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.email=a@b", "-c", "user.name=c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "__init__.py", *[".venv"] * tracked)
    git("commit", "-q", "-m", "private")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook of that repository
    monkeypatch.setattr(run_folder, "__file__", str(package / "run" / "folder.py"))
    assert describe_run(tmp_path, {}, 0)["git_commit"] == (git("rev-parse", "HEAD") if tracked else None)

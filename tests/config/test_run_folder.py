"""A run's own `config.yaml` means the folder it lies in; a rehearsal leaves the run's folder to the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sd3tune.config import dump_config, load_config, parse_config

COPY = {"versions": {}, "resumes": [], "timings": {}, "report": {}}
"""On the Hub, which is told no command line."""
OURS = {"argv": [], "versions": {}, "resumes": [], "timings": {}}
DATA = {"sources": [{"path": "photos", "caption": "a dog"}]}


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Path:
    """A run folder, as training writes it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    config = parse_config({"name": "first", "data": DATA, "output_dir": str(folder)}).config
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "run.json").write_text(json.dumps(OURS | {"report": {}}))
    return folder


def folder_of(file: Path | str, *overrides: str) -> Path:
    return Path(str(load_config(file, overrides).config.output_dir))


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_a_moved_or_copied_run_is_in_its_new_place_and_says_so(run: Path, tmp_path: Path, move) -> None:
    move(run, tmp_path / "moved")
    loaded = load_config("moved/config.yaml", ["train.steps=7"])
    assert loaded.config.output_dir == str(tmp_path / "moved")
    assert loaded.config.data.sources[0].path == str(tmp_path / "photos")  # as it was
    (note,) = loaded.notes
    assert note == (f"moved/config.yaml is in a run folder, so output_dir is {tmp_path / 'moved'} and not {run}")


def test_one_that_was_not_moved_is_where_it_was_without_a_word(run: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(run)
    for file in (run / "config.yaml", "runs/first/config.yaml", "latest/config.yaml"):
        assert folder_of(file) == run
        assert load_config(file).notes == ()


def test_an_override_wins(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(run, tmp_path / "moved"))
    assert folder_of(moved / "config.yaml", "output_dir=runs/second") == tmp_path / "runs" / "second"
    assert folder_of(moved / "config.yaml", "output_dir=null") == tmp_path / "runs" / "first"


def test_what_extends_it_is_another_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("extends: runs/first/config.yaml\n")
    moved = Path(shutil.move(run, tmp_path / "moved"))
    (tmp_path / "more.yaml").write_text("extends: moved/config.yaml\n")
    assert folder_of(tmp_path / "more.yaml") == run
    assert moved != run


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("config.yaml", None),
        ("config.yaml", "{"),
        ("config.yaml", "[]"),
        ("config.yaml", '{"name": "of another tool"}'),
        ("config.yaml", json.dumps(COPY)),
        ("config.yaml", '{"sd3tune_run": "yes", "argv": []}'),
        ("config.yaml", "[" * 100_000),
        ("other.yaml", json.dumps(OURS)),
    ],
)
def test_a_file_elsewhere_or_of_another_name_is_a_plain_configuration(
    run: Path, tmp_path: Path, name: str, described: str | None
) -> None:
    (tmp_path / "else").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "else" / name)
    if described is not None:
        (tmp_path / "else" / "run.json").write_text(described)
    loaded = load_config(tmp_path / "else" / name)
    assert (loaded.config.output_dir, loaded.notes) == (str(run), ())


def test_a_hand_written_file_in_a_run_folder_of_its_own_keeps_the_default(run: Path, tmp_path: Path) -> None:
    """It names no `output_dir`, so it is no configuration that a run wrote."""
    (run / "config.yaml").write_text("name: x\ndata: {sources: [{path: photos}]}\n")
    assert folder_of(run / "config.yaml") == tmp_path / "runs" / "x"


# Rehearsals.


def written(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "rex.yaml"
    file.write_text("\n".join(["name: rex", "data: {sources: [{path: photos}]}", *lines]))
    return file


@pytest.mark.parametrize("base", ["tiny", "tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large"])
@pytest.mark.parametrize("lines", [[], ["model: {base: nano}"], ["extends: preset:sd35_large_12gb"]])
def test_a_rehearsal_leaves_the_folder_to_the_run(base: str, lines: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, *lines)
    for override in (f"model.base={base}", f"model={{base: {base}}}"):
        loaded = load_config(file, [override, "train.steps=90"])
        assert loaded.config.output_dir == str(tmp_path / "runs" / "rex-tiny")
        assert (
            f"override {override}: a rehearsal: its folder is runs/rex-tiny, so that runs/rex stays free for the run"
            in loaded.notes
        )
    assert folder_of(file) == tmp_path / "runs" / "rex"


@pytest.mark.parametrize(
    ("lines", "overrides", "folder"),
    [
        (["model: {base: tiny}"], [], "runs/rex"),
        (["model: {base: tiny}"], ["model.base=tiny-sd3"], "runs/rex"),
        (["model: {base: tiny}"], ["model.base=nano"], "runs/rex"),
        ([], ["model.base=nano"], "runs/rex"),
        ([], ["model.base=tiny", "name=try"], "runs/try"),
        ([], ["model.base=tiny", "output_dir=here"], "here"),
        (["output_dir: here"], ["model.base=tiny"], "here"),
    ],
)
def test_any_other_run_is_where_it_says(
    lines: list[str], overrides: list[str], folder: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_config(written(tmp_path, *lines), overrides)
    assert (loaded.config.output_dir, loaded.notes) == (str(tmp_path / folder), ())


def test_plain_values_are_no_rehearsal(tmp_path: Path, monkeypatch) -> None:
    """As for `data check DIR model.base=tiny`, which has no run."""
    monkeypatch.chdir(tmp_path)
    assert parse_config({"data": DATA}, ["model.base=tiny"]).notes == ()

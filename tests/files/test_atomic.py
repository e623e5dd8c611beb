"""Files and folders that appear whole or not at all, and what is done about those whose writer was killed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sd3tune.files.atomic import (
    WriteError,
    kept_in_place,
    new_file,
    new_folder,
    remove_folder,
    remove_stale,
    remove_unfinished,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "file") as temporary:
        fail(temporary)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "folder") as temporary:
        fail(temporary / "inside")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_the_systems_refusal_names_the_folder_and_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file: cannot write here: (File exists|Not a directory); choose another"):
        write_text(tmp_path / "file" / "name", "")


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    for half in (".tmp-7-run.json", "checkpoints/.tmp-7-step-000002/.tmp-7-state.json", "samples/.tmp-8-a.png"):
        write_text(tmp_path / half, "half")
    write_text(tmp_path / ".tmp-7-removed-step-000001" / "state.json", "half")
    write_text(tmp_path / "samples" / "a.png", "whole")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["checkpoints", "samples", "samples/a.png"]


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_was_about_to_be_replaced_gets_its_name_back(tmp_path: Path, replaced: bool) -> None:
    """Its writer was killed between the two renames, or after the second."""
    write_text(tmp_path / ".tmp-7-old-best" / "file", "old")
    write_text(tmp_path / ("best" if replaced else ".tmp-7-best") / "file", "new")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["best", "best/file"]
    assert (tmp_path / "best" / "file").read_text() == ("new" if replaced else "old")


def test_a_folder_is_removed(tmp_path: Path) -> None:
    write_text(tmp_path / "folder" / "deep" / "file", "")
    remove_folder(tmp_path / "folder")
    assert names(tmp_path) == []


def test_where_others_write_only_what_is_old_is_removed(tmp_path: Path) -> None:
    for name in (".tmp-7-old.png", ".tmp-8-new.png", "old.png"):
        (tmp_path / name).touch()
        if "old" in name:
            os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    remove_stale(tmp_path)
    assert names(tmp_path) == [".tmp-8-new.png", "old.png"]


def test_links_that_lead_elsewhere_are_replaced_or_removed_and_never_followed(tmp_path: Path) -> None:
    """Somebody who shares the folder has put them there."""
    write_text(tmp_path / "elsewhere" / "file", "precious")
    shared = tmp_path / "shared"
    write_text(shared / "whole", "")
    (shared / "name").symlink_to(tmp_path / "elsewhere" / "file")
    (shared / "folder").symlink_to(tmp_path / "elsewhere")
    (shared / ".tmp-1-link").symlink_to(tmp_path / "elsewhere")
    (shared / ".tmp-2-old-best").symlink_to(tmp_path / "elsewhere")
    write_text(shared / "name", "ours")
    remove_unfinished(shared)
    assert names(shared) == ["folder", "name", "whole"]
    assert (shared / "name").read_text() == "ours"
    assert not (shared / "name").is_symlink()
    assert names(tmp_path / "elsewhere") == ["file"]
    assert (tmp_path / "elsewhere" / "file").read_text() == "precious"


def test_temporary_names_cannot_be_guessed_and_never_take_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = set()
    for number in range(20):
        with new_file(tmp_path / str(number)) as temporary:
            used.add(temporary.name.removesuffix(f"-{number}"))
            temporary.write_text("")
    assert len(used) == 20

    monkeypatch.setattr("secrets.token_hex", lambda count: "guessed")
    (tmp_path / ".tmp-guessed-name").symlink_to(tmp_path / "planted")
    for write in (lambda path: write_text(path, "ours"), lambda path: new_file(path).__enter__()):
        with pytest.raises(WriteError, match="cannot write here: File exists"):
            write(tmp_path / "name")
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_was_moved_is_not_made_again(tmp_path: Path, replaced: bool) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with kept_in_place(run):
        write_text(run / "a" / "b" / "file", "")
        run.rename(tmp_path / "moved")
        if replaced:
            run.mkdir()
        for path in (run / "file", run / "a" / "file", run / "c" / "d" / "file"):
            with pytest.raises(WriteError, match="No such file or directory"):
                write_text(path, "")
        with pytest.raises(WriteError, match="No such file or directory"), new_folder(run / "folder"):
            pass
        write_text(tmp_path / "elsewhere" / "file", "")
    assert names(tmp_path) == sorted(
        ["elsewhere", "elsewhere/file", "moved", "moved/a", "moved/a/b", "moved/a/b/file", *["run"] * replaced]
    )
    write_text(run / "file", "")


def test_a_folder_that_is_moved_while_one_in_it_is_written_gets_no_part(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def move_and_write(temporary: Path) -> None:
        run.rename(tmp_path / "moved")
        temporary.mkdir(parents=True)  # as libraries do
        (temporary / "part").touch()

    with kept_in_place(run), pytest.raises(WriteError), new_folder(run / "model") as temporary:
        move_and_write(temporary)
    assert not list(run.iterdir())

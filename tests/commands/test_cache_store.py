"""`cache ls` and `cache prune`: what they say, what they remove, and what they leave alone."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from sd3tune.commands.cache import run_cache
from sd3tune.commands.cache_store import find_store, list_store, prune_store
from sd3tune.commands.train import run_training
from sd3tune.config import dump_config
from sd3tune.data.store import Store
from sd3tune.errors import RunError


@pytest.fixture
def config(quick_config, tmp_path: Path):
    return quick_config(tmp_path / "run", f"data.cache_dir={tmp_path / 'store'}", "train.steps=1", "data.flip=true")


@pytest.fixture
def root(config, tmp_path: Path) -> Path:
    """The store of five pictures and their captions."""
    run_cache(config)
    return tmp_path / "store"


def make_old(root: Path, days: float) -> None:
    past = time.time() - days * 86400
    for path in root.glob("shard-*"):
        os.utime(path, (past, past))


def test_entries_are_listed_by_kind_with_their_bytes(root: Path) -> None:
    lines = list_store(root)
    assert lines[0] == f"store     {root}"
    counted = {line[:15].strip(): line[15:].split() for line in lines[1:]}
    assert counted["images"][:2] == ["10", "entries"]
    assert counted["captions, CLIP"][:2] == ["10", "entries"]
    assert counted["captions, T5"][:2] == ["5", "entries"]
    assert "last used       within the hour, the oldest part within the hour" in lines
    assert re.fullmatch(r"in all +\d files +\d\.\d MB", lines[-1])
    make_old(root, 12)
    assert "last used       12 days ago, the oldest part 12 days ago" in list_store(root)


def test_pruning_says_what_it_would_remove_and_does_it_when_told(root: Path) -> None:
    (root / "shard-bad.safetensors").write_bytes(b"bad")
    (root / ".tmp-1-shard").write_bytes(b"unfinished")
    files = sorted(root.iterdir())
    lines = prune_store(root)
    assert lines[1:] == [
        "to remove: 1 file, temporary, 0.0 MB",
        "to remove: 1 file, unreadable, 0.0 MB",
        "dry run: nothing was removed; add --yes to remove these files",
    ]
    assert sorted(root.iterdir()) == files
    assert [line.split(":")[0] for line in prune_store(root, yes=True)[1:]] == ["removed", "removed"]
    assert len(Store(root)) == 25
    assert prune_store(root, yes=True)[1:] == ["nothing to remove"]


def test_what_was_used_lately_stays(root: Path, config) -> None:
    make_old(root, 40)
    assert "nothing to remove" not in prune_store(root, older_than=30)
    run_training(config)
    assert prune_store(root, older_than=30, yes=True)[1:] == ["nothing to remove"]
    make_old(root, 40)
    prune_store(root, older_than=30, yes=True)
    assert len(Store(root)) == 0


def test_everything_goes_with_all_and_is_new_again(root: Path, config, capsys) -> None:
    (root / "notes.txt").write_text("mine")
    prune_store(root, everything=True, yes=True)
    assert {path.name for path in root.iterdir()} == {"notes.txt", "store.lock", "gate.lock", "user-0.lock"}
    assert list_store(root)[1:] == ["empty"]
    capsys.readouterr()
    run_cache(config)
    assert "images: 5 x 2 variants, all new" in capsys.readouterr().out


def test_a_run_in_progress_keeps_its_store(root: Path, config) -> None:
    refused = []

    def intrude(view: object) -> None:
        with pytest.raises(RunError) as caught:
            prune_store(root, everything=True, yes=True)
        refused.append(caught.value.problems[0])

    run_training(config, callbacks=[intrude])
    assert len(refused) == 2
    assert all("a run is using this store" in line for line in refused)
    assert len(Store(root)) == 25


def test_the_store_is_found_by_folder_by_configuration_and_by_place(root: Path, config, tmp_path: Path, monkeypatch):
    (tmp_path / "my.yaml").write_text(dump_config(config))
    assert find_store(root) == find_store(tmp_path / "my.yaml") == root
    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RunError, match="no store there"):
        find_store(None)
    Store(tmp_path / "cache" / "store").root.mkdir(parents=True)
    with pytest.raises(RunError, match="is not a store of encodings"):
        find_store(None)
    monkeypatch.delenv("SD3TUNE_CACHE")
    (tmp_path / ".cache").mkdir()
    root.rename(tmp_path / ".cache" / "sd3tune")
    monkeypatch.chdir(tmp_path)
    assert find_store(None) == tmp_path / ".cache" / "sd3tune"


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".tmp-1").write_text("mine")
    with pytest.raises(RunError, match="is not a store of encodings"):
        prune_store(tmp_path / "shards", everything=True, yes=True)
    assert (tmp_path / "shards" / ".tmp-1").exists()


def test_two_ways_of_saying_how_much_are_one_too_many(root: Path) -> None:
    with pytest.raises(RunError, match="give one of them"):
        prune_store(root, everything=True, older_than=3, yes=True)

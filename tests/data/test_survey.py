import os
import time

import pytest
import torch

from sd3tune.data.store import Store, is_store
from sd3tune.data.survey import remove, survey
from sd3tune.errors import RunError


@pytest.fixture
def root(tmp_path):
    """A store of two shards, an unreadable shard, a file of a dead writer, and a stranger's file."""
    root = tmp_path / "store"
    with Store(root).writer() as writer:
        for number in range(3):
            writer.put(f"image-{number}", {"mean": torch.zeros(4), "std": torch.zeros(4)})
        writer.flush()
        writer.put("text", {"hidden": torch.zeros(10)})
    (root / "shard-bad.safetensors").write_bytes(b"not a shard")
    (root / ".tmp-1-shard-dead.safetensors").write_bytes(b"x" * 100)
    (root / "notes.txt").write_text("mine")
    return root


def age(path, days):
    past = time.time() - days * 86400
    os.utime(path, (past, past))


def shard_of(root, key):
    return Store(root)._index[key].shard


def test_what_lies_there_is_counted_by_kind(root):
    files = survey(root)
    assert sorted(file.kind for file in files) == ["shard", "shard", "temporary", "unreadable"]
    entries = {}
    for file in files:
        for names, count in file.entries.items():
            entries[names] = (count, file.entry_bytes[names])
    assert entries == {("mean", "std"): (3, 3 * 2 * 4 * 4), ("hidden",): (1, 40)}
    assert all(file.nbytes == file.path.stat().st_size for file in files)


def test_only_what_is_unwanted_goes(root):
    removed = remove(root, lambda file: file.kind != "shard")
    assert sorted(file.kind for file in removed) == ["temporary", "unreadable"]
    assert not any(file.path.exists() for file in removed)
    store = Store(root)
    assert len(store) == 4
    assert not store.damaged
    assert (root / "notes.txt").exists()


def test_age_is_since_the_last_use(root):
    old, read = shard_of(root, "image-0"), shard_of(root, "text")
    for shard in (old, read):
        age(shard, 30)
    idle = {file.path: file.idle_days for file in survey(root)}
    assert idle[old] == pytest.approx(30, abs=0.1)
    Store(root).get("text")
    removed = remove(root, lambda file: file.kind == "shard" and file.idle_days > 20)
    assert [file.path for file in removed] == [old]
    store = Store(root)
    assert "text" in store
    assert "image-0" not in store


def test_a_store_that_is_open_is_left_alone(root):
    store = Store(root)
    with pytest.raises(RunError, match="a run is using this store"):
        remove(root, lambda file: True)
    assert len(survey(root)) == 4
    assert torch.equal(store.get("text")["hidden"], torch.zeros(10))
    del store
    assert len(remove(root, lambda file: True)) == 4


def test_a_store_that_is_made_by_writing_is_protected_too(tmp_path):
    store = Store(tmp_path / "new")
    with store.writer() as writer:
        writer.put("a", {"x": torch.zeros(1)})
    with pytest.raises(RunError):
        remove(tmp_path / "new", lambda file: True)
    assert "a" in store


def test_two_stores_may_be_open_at_once(root):
    one, other = Store(root), Store(root)
    assert len(one) == len(other) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_still_read(root):
    for lock in root.glob("*.lock"):
        lock.unlink()
    root.chmod(0o500)
    try:
        assert len(Store(root)) == 4
    finally:
        root.chmod(0o700)


def test_other_folders_are_no_stores(root, tmp_path):
    assert is_store(root)
    assert not is_store(tmp_path)
    remove(root, lambda file: True)
    assert is_store(root)

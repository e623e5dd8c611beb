import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sd3tune.data.store import Store, key, read_index
from sd3tune.data.survey import survey
from sd3tune.errors import RunError

PUT_FOREVER = """
import sys, torch
from pathlib import Path
from sd3tune.data.store import Store, key
with Store(Path(sys.argv[1])).writer(shard_bytes=5 * 40_000) as writer:   # five entries a shard
    for number in range(10**6):
        writer.put(key("test", number=number), {"x": torch.full((10_000,), float(number))})
        print(number, flush=True)
"""

PUT_MANY = """
import sys, torch
from pathlib import Path
from sd3tune.data.store import Store, key
first = int(sys.argv[2])
with Store(Path(sys.argv[1])).writer(shard_bytes=100) as writer:
    print("ready", flush=True); sys.stdin.readline()
    for number in range(first, first + 60):
        writer.put(key("test", number=number), {"x": torch.full((50,), float(number))})
"""

PUT_TOO_MUCH = """
import resource, sys, torch
from pathlib import Path
from sd3tune.data.store import Store
from sd3tune.errors import RunError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))   # then writing fails with EFBIG
try:
    with Store(Path(sys.argv[1])).writer(shard_bytes=1) as writer:
        writer.put("a" * 64, {"x": torch.zeros(1000)})
        writer.put("b" * 64, {"x": torch.zeros(100_000)})
except RunError as error:
    print("RunError:", *error.problems, sep="\\n")
"""


def number_key(number):
    return key("test", number=number)


def start(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def fill(root, numbers, **options):
    store = Store(root)
    with store.writer(**options) as writer:
        for number in numbers:
            writer.put(number_key(number), {"x": torch.full((50,), float(number))})
    return store


def shards(root):
    return sorted(root.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entries_come_back_bit_for_bit(tmp_path, dtype):
    raw = torch.randint(-(2**15), 2**15, (3, 64), dtype=torch.int16)  # any bits, NaN payloads included
    entry = {"mean": raw.view(dtype), "std": torch.randn(2, 5, 7).to(dtype)}
    store = Store(tmp_path)
    with store.writer() as writer:
        writer.put("k" * 64, entry)
    for reader in (store, Store(tmp_path)):
        found = reader.get("k" * 64)
        assert found.keys() == entry.keys()
        for name in entry:
            assert found[name].dtype == dtype
            assert found[name].shape == entry[name].shape
            assert torch.equal(found[name].view(torch.int16), entry[name].view(torch.int16))


def test_views_of_one_tensor_and_later_changes_do_not_leak_in(tmp_path):
    moments = torch.arange(8.0)
    store = Store(tmp_path)
    with store.writer() as writer:
        writer.put("k", {"mean": moments[:4], "std": moments[4:]})
        moments.zero_()
    assert store.get("k")["std"].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert store.nbytes(["k"]) == 32


def test_a_key_depends_on_every_field_and_not_on_their_order():
    assert key("image", size=(8, 8), flip=True) == key("image", flip=True, size=(8, 8))
    distinct = [
        key("image", size=(8, 8), flip=True),
        key("image", size=(8, 8), flip=False),
        key("image", size=(8, 9), flip=True),
        key("text", size=(8, 8), flip=True),
        key("image", size="(8, 8)", flip=True),
    ]
    assert len(set(distinct)) == len(distinct)
    # sha256 of {"kind":"text","text":"a \u00fc"} as canonical ASCII JSON, from `sha256sum`
    assert key("text", text="a \u00fc") == "fa57398d0b03c285f4a2b65955e4a8669a3150b4e2d703d774788a56bcc1ed5a"


def test_a_store_that_was_never_written_is_empty_and_makes_no_folder(tmp_path):
    store = Store(tmp_path / "cache")
    assert store.missing(["b", "a", "b"]) == ["b", "a"]
    assert "a" not in store
    assert not (tmp_path / "cache").exists()
    with pytest.raises(KeyError):
        store.get("a")


def test_shards_are_flushed_by_size_by_time_and_at_the_end(tmp_path):
    fill(tmp_path / "size", range(10), shard_bytes=600)  # 200 bytes an entry
    assert len(shards(tmp_path / "size")) == 4
    fill(tmp_path / "time", range(3), flush_seconds=0)
    assert len(shards(tmp_path / "time")) == 3
    fill(tmp_path / "end", range(10))
    assert len(shards(tmp_path / "end")) == 1


def test_what_was_put_before_an_interruption_is_kept(tmp_path):
    def interrupted():
        with Store(tmp_path).writer() as writer:
            writer.put("a", {"x": torch.ones(2)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "a" in Store(tmp_path)


def test_a_key_that_is_there_is_not_written_again(tmp_path):
    fill(tmp_path, range(3))
    store = fill(tmp_path, range(4))
    assert len(store) == 4
    entries = [list(safe_open(path, "pt").keys()) for path in shards(tmp_path)]
    assert [f"{number_key(3)}/x"] in entries
    assert sum(map(len, entries)) == 4


def test_killed_while_putting_entries_loses_only_what_was_not_flushed(tmp_path):
    process = start(PUT_FOREVER, tmp_path)
    put = [int(process.stdout.readline()) for _ in range(52)][-1]
    process.send_signal(signal.SIGKILL)
    put = max([put, *map(int, process.stdout.read().split())])
    assert process.wait() == -signal.SIGKILL

    store = Store(tmp_path)
    assert not store.damaged
    missing = store.missing(number_key(number) for number in range(put + 1))
    assert len(missing) <= 5
    assert missing == [number_key(number) for number in range(put + 1)][put + 1 - len(missing) :]
    for number in range(put + 1 - len(missing)):
        assert torch.equal(store.get(number_key(number))["x"], torch.full((10_000,), float(number)))
    with store.writer() as writer:
        for lost in missing:
            writer.put(lost, {"x": torch.ones(1)})
    assert not Store(tmp_path).missing(number_key(number) for number in range(put + 1))


def test_two_processes_write_at_once_and_a_third_reads(tmp_path):
    reader = Store(tmp_path)
    writers = [start(PUT_MANY, tmp_path, first) for first in (0, 30)]  # 30 entries in common
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    seen = 0
    while any(writer.poll() is None for writer in writers):
        reader.refresh()
        assert len(reader) >= seen
        seen = len(reader)
        time.sleep(0.01)
    assert [writer.wait() for writer in writers] == [0, 0]
    reader.refresh()
    assert len(reader) == 90
    assert not reader.damaged
    for number in range(90):
        assert torch.equal(reader.get(number_key(number))["x"], torch.full((50,), float(number)))


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:20])


def cut_in_the_tensors(path):
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path):
    path.write_bytes(b"")


def overwritten(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


def header_of_another_kind(path):
    path.write_bytes((2).to_bytes(8, "little") + b"[]")


def a_models_weights(path):
    save_file({"weight": torch.ones(2)}, path)


@pytest.mark.parametrize(
    "damage",
    [cut_in_the_header, cut_in_the_tensors, emptied, overwritten, header_of_another_kind, a_models_weights],
)
def test_an_unreadable_shard_is_passed_over_with_one_warning(tmp_path, caplog, damage):
    fill(tmp_path, range(6), shard_bytes=400)
    victim = shards(tmp_path)[1]
    damage(victim)
    with caplog.at_level(logging.WARNING):
        store = Store(tmp_path)
        store.refresh()
    assert len(caplog.records) == 1
    assert str(victim) in caplog.messages[0]
    assert store.damaged
    missing = store.missing(map(number_key, range(6)))
    assert len(missing) == 2
    with store.writer() as writer:
        for lost in missing:
            writer.put(lost, {"x": torch.ones(1)})
    assert not Store(tmp_path).missing(map(number_key, range(6)))


def test_a_full_disk_is_one_line_that_names_the_folder_and_leaves_nothing_half_written(tmp_path):
    root = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", PUT_TOO_MUCH, str(root)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kind, line = done.stdout.splitlines()
    assert kind == "RunError:"
    assert line.startswith(f"{root}: ")
    assert "free some space" in line
    assert len(list(root.glob("shard-*"))) == 1  # the entry that fitted
    assert not [path for path in root.iterdir() if not path.name.startswith("shard-") and path.suffix != ".lock"]
    assert "a" * 64 in Store(root)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"file/cache: cannot be written \(Not a directory\)"):
        fill(tmp_path / "file" / "cache", range(1))


def test_temporary_files_are_ignored_and_only_old_ones_removed(tmp_path):
    old, new = tmp_path / ".tmp-1-shard-old.safetensors", tmp_path / ".tmp-2-shard-new.safetensors"
    for path in (old, new):
        path.write_bytes(b"half a sh")
    os.utime(old, (time.time() - 7200,) * 2)
    store = fill(tmp_path, range(2))
    assert not store.damaged
    assert not old.exists()
    assert new.exists()


def test_a_shard_that_vanished_is_one_line(tmp_path):
    fill(tmp_path, range(1))
    store = Store(tmp_path)
    shards(tmp_path)[0].unlink()
    with pytest.raises(RunError, match="run again"):
        store.get(number_key(0))


def test_many_threads_read_at_once(tmp_path):
    fill(tmp_path, range(200), shard_bytes=400)
    store = Store(tmp_path)
    wrong = []

    def read(offset):
        for step in range(400):
            number = (offset * 37 + step) % 200
            if store.get(number_key(number))["x"][3].item() != number:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nbytes_counts_tensors_once(tmp_path):
    store = fill(tmp_path, range(5))
    assert store.nbytes(map(number_key, (0, 1, 1))) == 2 * 50 * 4


def rewritten(shard, change):
    """The shard with other tensors under its header."""
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(change(tensors), shard, metadata=metadata)


def zeros(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def a_flipped_bit(tensors):
    first = min(tensors)
    tensors[first].view(torch.uint8)[-1] ^= 1
    return tensors


def swapped(tensors):
    names = sorted(tensors)
    return {name: tensors[other].clone() for name, other in zip(names, reversed(names), strict=True)}


def reshaped(tensors):
    return {name: tensor.reshape(1, -1) for name, tensor in tensors.items()}


@pytest.mark.parametrize("damage", [zeros, a_flipped_bit, swapped, reshaped])
def test_damaged_entries_are_found_before_they_are_used_and_written_again(tmp_path, damage):
    fill(tmp_path, range(4), shard_bytes=400)
    victim = shards(tmp_path)[0]
    lost = {name.partition("/")[0] for name in safe_open(victim, framework="pt").keys()}  # noqa: SIM118
    rewritten(victim, damage)

    store, keys = Store(tmp_path), [number_key(number) for number in range(4)]
    assert store.damaged is False
    assert set(store.check(keys)) == lost
    assert set(store.missing(keys)) == lost
    assert victim not in shards(tmp_path)
    assert [file.kind for file in survey(tmp_path)].count("unreadable") == 1
    with store.writer() as writer:
        for number in range(4):
            writer.put(number_key(number), {"x": torch.full((50,), float(number))})
    for number in range(4):
        assert Store(tmp_path).get(number_key(number))["x"].eq(number).all()


def test_an_entry_that_was_not_checked_is_compared_when_it_is_read(tmp_path):
    fill(tmp_path, range(1, 5), shard_bytes=400)
    rewritten(shards(tmp_path)[0], zeros)
    store, keys = Store(tmp_path), [number_key(number) for number in range(1, 5)]
    assert store.check(keys, nbytes=0) == []
    lost = read_index(shards(tmp_path)[0])
    with pytest.raises(RunError, match=r"damaged on the disk; run again \(with --resume\) to encode it again"):
        store.get(next(iter(lost)))
    assert set(store.missing(keys)) == set(Store(tmp_path).missing(keys)) == set(lost)


def test_entries_of_earlier_versions_have_no_digest_and_are_taken(tmp_path):
    fill(tmp_path, range(2))
    (shard,) = shards(tmp_path)
    with safe_open(shard, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, shard)
    store = Store(tmp_path)
    assert store.check([number_key(0), number_key(1)]) == []
    assert store.get(number_key(1))["x"].eq(1).all()

"""Door: what an earlier run left, as somebody changed it: shards of the store and the JSON of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sd3tune.data.store import Store, read_index
from sd3tune.training.checkpoint import read_state
from tests.fuzz.door import try_door
from tests.fuzz.pieces import damaged, json_text

KEYS = ["a" * 64, "b" * 64]


@pytest.fixture
def shard(tmp_path: Path) -> bytes:
    """The bytes of a shard with two entries."""
    with Store(tmp_path / "whole").writer() as writer:
        for key in KEYS:
            writer.put(key, {"mean": torch.ones(4), "std": torch.zeros(2, 2)})
    (whole,) = (tmp_path / "whole").glob("shard-*.safetensors")
    return whole.read_bytes()


def read(folder: Path, content: bytes) -> None:
    """Read all of a store with one such shard: an entry with a digest is what was written."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("shard-*"):
        old.unlink()
    file = folder / "shard-1.safetensors"
    file.write_bytes(content)
    store = Store(folder)
    store.check(KEYS)
    for key in KEYS:
        if key in store:
            entry = store.get(key)
            if read_index(file)[key].digest is None:
                continue
            assert torch.equal(entry["mean"], torch.ones(4))
            assert torch.equal(entry["std"], torch.zeros(2, 2))


def test_the_header_of_a_shard(shard: bytes, tmp_path: Path) -> None:
    end = 8 + int.from_bytes(shard[:8], "little")

    def call(text: bytes) -> None:
        read(tmp_path / "store", len(text).to_bytes(8, "little") + text + shard[end:])

    try_door("store, header", json_text(json.loads(shard[8:end])), call, tmp_path)


def test_the_bytes_of_a_shard(shard: bytes, tmp_path: Path) -> None:
    try_door("store, bytes", damaged(shard), lambda content: read(tmp_path / "store", content), tmp_path)


def test_the_state_of_a_checkpoint(tmp_path: Path) -> None:
    stated = {"step": 3, "identity": {"seed": 1}, "layout": {"a.lora_A": [2, 2]}, "digests": {"master": "0" * 32}}

    def call(text: bytes) -> None:
        (tmp_path / "state.json").write_bytes(text)
        state = read_state(tmp_path)
        assert state["step"] >= 0

    try_door("checkpoint", json_text(stated), call, tmp_path)

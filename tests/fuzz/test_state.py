"""Door: what an earlier run left, as somebody changed it: shards of the store and the JSON of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save

from sd3tune.data.store import Store
from sd3tune.training.checkpoint import read_state
from tests.fuzz.door import damaged, json_text, try_door


def test_a_shard_of_the_store(tmp_path: Path) -> None:
    with Store(tmp_path / "whole").writer() as writer:
        for key in ("a" * 64, "b" * 64):
            writer.put(key, {"mean": torch.ones(4), "std": torch.zeros(2, 2)})
    (whole,) = (tmp_path / "whole").glob("shard-*.safetensors")
    content = whole.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])

    def call(text: bytes) -> None:
        (tmp_path / "store").mkdir(exist_ok=True)
        for shard in (tmp_path / "store").glob("shard-*"):
            shard.unlink()
        (tmp_path / "store" / "shard-1.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
        store = Store(tmp_path / "store")
        store.check(["a" * 64, "b" * 64])
        for key in store.missing([]) or [key for key in ("a" * 64, "b" * 64) if key in store]:
            store.get(key)

    try_door("store", json_text(header), call)
    try_door("store, bytes", damaged(content), lambda text: call(text[8:]))


def test_the_state_of_a_checkpoint(tmp_path: Path) -> None:
    stated = {"step": 3, "identity": {"seed": 1}, "layout": {"a.lora_A": [2, 2]}, "digests": {"master": "0" * 32}}

    def call(text: bytes) -> None:
        (tmp_path / "state.json").write_bytes(text)
        state = read_state(tmp_path)
        assert state["step"] >= 0

    try_door("checkpoint", json_text(stated), call)
    assert save({"a": torch.ones(1)})

"""Door: the configurations in a model folder, up to the models without weights that are built from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from sd3tune.model.base.base import Base
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.base.single_file_header import released_shape
from sd3tune.model.base.weights import weight_files
from sd3tune.model.load.components import empty_transformer, load_scheduler, load_vae, text_encoder_shape
from tests.fuzz.door import try_door
from tests.fuzz.pieces import json_text

PARTS: dict[str, tuple[str, Callable[[Base], object]]] = {
    "transformer": ("config.json", empty_transformer),
    "vae": ("config.json", lambda base: load_vae(base, torch.float32, "meta")),
    "text_encoder": ("config.json", lambda base: text_encoder_shape(base, "clip_l", torch.float16)),
    "text_encoder_3": ("config.json", lambda base: text_encoder_shape(base, "t5", torch.float16)),
    "scheduler": ("scheduler_config.json", load_scheduler),
}
FURTHER = ("num_labels", "id2label", "dtype", "torch_dtype", "quantization_config", "_class_name", "pruned_heads", "x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `tiny`, whose configurations are replaced and put back."""
    return Path(shutil.copytree(resolve_base("tiny").path, tmp_path_factory.mktemp("fuzz") / "tiny"))


@pytest.mark.parametrize("part", PARTS)
def test_the_configuration_of_a_part(part: str, folder: Path) -> None:
    name, build = PARTS[part]
    file = folder / part / name
    before = file.read_bytes()

    def call(text: bytes) -> None:
        file.write_bytes(text)
        base = resolve_base(str(folder))
        build(base)
        if part == "transformer":
            released_shape(base.config(part))

    try:
        try_door(f"model folder, {part}", json_text(json.loads(before), FURTHER), call, folder)
    finally:
        file.write_bytes(before)


def test_the_index_of_the_folder_and_its_contract(folder: Path) -> None:
    index, contract = folder / "model_index.json", folder / "sd3tune.json"
    before = index.read_bytes()
    stated = {"resolution": 512, "encoders": ["clip_l", "clip_g", "t5"], "guidance": 4.5, "sampling_steps": 28}

    def call(texts: tuple[bytes, bytes]) -> None:
        index.write_bytes(texts[0])
        contract.write_bytes(texts[1])
        base = resolve_base(str(folder))
        assert (base.distilled, base.noise_offset, base.contract) is not None

    try:
        try_door("model folder, index", st.tuples(json_text(json.loads(before)), json_text(stated)), call, folder)
    finally:
        index.write_bytes(before)
        contract.unlink(missing_ok=True)


def test_the_index_of_the_shards(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "a.safetensors").write_bytes(b"")

    def call(text: bytes) -> None:
        index.write_bytes(text)
        weight_files(tmp_path)

    stated = {"metadata": {"total_size": 1}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}
    long = json.dumps({"weight_map": {"a": "[" * 2000 + ".safetensors"}}).encode()
    try_door("model folder, shards", json_text(stated), call, tmp_path, known=[long])

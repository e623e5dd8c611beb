"""Door: an adapter's file, its metadata and the configuration beside it, through `inspect` and as `infer` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.lora_inspect import inspect_lora
from sd3tune.errors import UserError
from tests.fuzz.door import try_door
from tests.fuzz.pieces import ODD, changed, damaged, json_text

MODULES = [f"transformer_blocks.{block}.attn.to_{letter}" for block in (0, 1) for letter in "qkv"]
PEFT = {
    "transformer.r": 2,
    "transformer.lora_alpha": 4,
    "transformer.target_modules": MODULES,
    "transformer.rank_pattern": {"attn.to_q": 2},
    "transformer.alpha_pattern": {f"^{MODULES[0]}": 8, "attn.to_k": 1},
    "transformer.use_rslora": False,
    "transformer.bias": "none",
}
CONTRACT = {
    "base": "tiny",
    "base_kind": "tiny",
    "base_fingerprint": "0" * 64,
    "contract_version": 1,
    "encoders": ["clip_l", "clip_g", "t5"],
    "encoder_files": {"clip_l": {"file": "a", "fingerprint": "b"}},
    "max_sequence_length": 77,
    "resolution": 512,
    "quantize": "none",
    "shift": 3.0,
    "timesteps": {"kind": "logit_normal", "mean": 0.0, "std": 1.0},
    "sigma_range": [0.0, 1.0],
    "guidance": 4.5,
    "tag_frequency": {"a": 1},
    "trigger": "sks",
}
KEYS = [f"transformer.{module}.{part}" for module in MODULES for part in ("lora_A.weight", "lora_B.weight", "alpha")]


def file_of(header: bytes, data: bytes = bytes(4096)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A header with pairs of factors, something of it changed; sizes that agree with the bytes are likely."""
    header: dict[str, Any] = {}
    end = 0
    for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=3, unique=True)):
        for part, shape in (("lora_A.weight", [2, 8]), ("lora_B.weight", [8, 2]), ("alpha", [])):
            size = 4 * (16 if shape else 1)
            header[f"transformer.{module}.{part}"] = {
                "dtype": "F32", "shape": shape, "data_offsets": [end, end + size],
            }  # fmt: skip
            end += size
    header["__metadata__"] = {
        "lora_adapter_metadata": draw(st.just(json.dumps(PEFT).encode()) | json_text(PEFT)).decode(errors="replace"),
        "sd3tune": draw(st.just(json.dumps(CONTRACT).encode()) | json_text(CONTRACT)).decode(errors="replace"),
        "modelspec.title": draw(st.text(max_size=8)),
    }
    if not draw(st.integers(0, 3)):
        header = draw(changed(header))
    text = json.dumps(header).encode()
    values = draw(st.sampled_from([0.0, 1.0, 1.0, 1e38, float("nan"), float("inf"), -1e30]))
    data = torch.full([end // 4], values).numpy().tobytes()
    content = file_of(text, data)
    return draw(damaged(content)) if not draw(st.integers(0, 5)) else content


def test_the_file_and_its_metadata(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"

    def call(content: bytes) -> None:
        file.write_bytes(content)
        try:
            adapter = read_adapter(file)
        except UserError:
            inspect_lora(file)  # may succeed, as it also describes what the others refuse
            raise
        assert all(up.isfinite().all() for _, up in adapter.folded().values())
        inspect_lora(file)

    try_door("adapter", headers(), call, tmp_path)


def test_the_configuration_beside_weights_of_peft(tmp_path: Path) -> None:
    header, end = {}, 0
    for module in MODULES:
        for part, shape in (("lora_A", [2, 8]), ("lora_B", [8, 2])):
            place = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 64]}
            header[f"base_model.model.{module}.{part}.weight"], end = place, end + 64
    (tmp_path / "adapter_model.safetensors").write_bytes(file_of(json.dumps(header).encode(), bytes(end)))
    plain = {key.removeprefix("transformer."): value for key, value in PEFT.items()} | {"peft_type": "LORA"}

    def call(text: bytes) -> None:
        (tmp_path / "adapter_config.json").write_bytes(text)
        read_adapter(tmp_path)

    try_door("adapter, PEFT's configuration", json_text(plain, ("use_dora", "layers_pattern")), call, tmp_path)


def test_patterns_of_any_text(tmp_path: Path) -> None:
    alphabet = st.text("ab.*+()|^$\\[]?{}_", max_size=30)

    def call(patterns: dict[str, Any]) -> None:
        header = {"__metadata__": {"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": patterns})}}
        place = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}
        header[f"transformer.{MODULES[0]}.lora_A.weight"] = place
        header[f"transformer.{MODULES[0]}.lora_B.weight"] = {**place, "shape": [8, 2], "data_offsets": [64, 128]}
        (tmp_path / "a.safetensors").write_bytes(file_of(json.dumps(header).encode(), bytes(128)))
        read_adapter(tmp_path / "a.safetensors")

    try_door("adapter, patterns", st.dictionaries(alphabet, st.just(2.0) | ODD, max_size=3), call, tmp_path)

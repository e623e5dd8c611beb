"""Door: a whole model, or a text encoder, in a single file, as its header describes it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.base.single_file_header import read_encoder
from sd3tune.model.load.components import empty_transformer, load_vae
from tests.fuzz.door import try_door
from tests.fuzz.pieces import damaged

DIMENSIONS = st.lists(st.sampled_from([0, 1, 2, 16, 64, 192, 10**6, 10**12]), max_size=5)


@st.composite
def files(draw: st.DrawFn, shapes: dict[str, list[int]]) -> bytes:
    """A file of zeros with these shapes, some changed, renumbered or left out; a byte for each value."""
    found = dict(shapes)
    for name in draw(st.lists(st.sampled_from(list(shapes)), max_size=3)):
        kind = draw(st.integers(0, 3))
        shape = found.pop(name, [1])
        if kind == 0:
            found[name] = draw(DIMENSIONS)
        elif kind == 1:
            number = draw(st.sampled_from(["7", "99999999", "9" * 4500, "007", "-1"]))
            found[".".join(number if part.isdigit() else part for part in name.split("."))] = shape
        elif kind == 2:
            found[name] = draw(st.permutations(shape))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in found.items():
        count = math.prod(shape)
        size = count if count < 10**7 else 0
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text
    return draw(damaged(content)) if not draw(st.integers(0, 6)) else content + bytes(end)


def shapes_in(file: Path) -> dict[str, list[int]]:
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}


def test_a_whole_model(single_file: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"

    def call(content: bytes) -> None:
        file.write_bytes(content)
        base = resolve_base(str(file))
        empty_transformer(base)
        load_vae(base, torch.float32, "meta")

    try_door("single file", files(shapes_in(single_file("tiny"))), call, tmp_path)


@pytest.mark.parametrize(
    ("encoder", "part"), [("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"), ("t5", "text_encoder_3")]
)
def test_a_text_encoder(encoder: str, part: str, tmp_path: Path) -> None:
    folder, file = resolve_base("tiny").path, tmp_path / "a.safetensors"

    def call(content: bytes) -> None:
        file.write_bytes(content)
        read_encoder(file, encoder)

    try_door(f"single file, {encoder}", files(shapes_in(folder / part / "model.safetensors")), call, tmp_path)

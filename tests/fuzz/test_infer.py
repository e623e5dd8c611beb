"""Doors: files of prompts, and the recipe in a picture, through all of `infer` but the drawing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from sd3tune.adapter.file import write_adapter
from sd3tune.commands.infer import run_infer
from sd3tune.errors import RunError
from sd3tune.files.regular import sha256_of
from sd3tune.files.tensors import tensors_sha256
from sd3tune.inference.job import InferenceJob
from sd3tune.model.base.resolve import resolve_base
from tests.fuzz import pictures
from tests.fuzz.bounds import OUTSIDE
from tests.fuzz.door import try_door
from tests.fuzz.pieces import NAMES, ODD, TEXTS, changed, damaged, in_encodings

Infer = Callable[..., None]


@pytest.fixture
def infer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Infer:
    """`infer(prompts=...)`: all checks are made; if none finds anything, it ends as there is no place to draw to."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("in the way of the folder of images")
    monkeypatch.chdir(tmp_path)

    def infer(**given: Any) -> None:
        try:
            run_infer(InferenceJob.from_fields(**{"loras": [], "out": tmp_path / "file" / "images", **given}))
        except RunError as error:
            if "--out" not in str(error):
                raise

    return infer


COLUMNS = {
    "prompt": "a dog",
    "negative": "a cat",
    "seed": 1,
    "steps": 2,
    "guidance": 3.0,
    "size": 64,
    "sampler": "heun",
}
FURTHER = (
    "sampler",
    "shift",
    "noise_offset",
    "prompt_clip_l",
    "prompt_t5",
    "slg",
    "image",
    "mask",
    "strength",
    "name",
    "promt",
)
LINES = st.lists(changed(COLUMNS, FURTHER), max_size=3)


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [",".join(columns), *(",".join(f'"{row.get(column, "")}"' for column in columns) for row in rows)]
    return "\n".join(lines).encode(errors="surrogatepass")


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def test_a_file_of_prompts(infer: Infer, tmp_path: Path) -> None:
    (tmp_path / "start.png").write_bytes(pictures.encoded("PNG", "RGB", (70, 64)))

    def call(given: tuple[str, bytes]) -> None:
        file = tmp_path / f"prompts{given[0]}"
        file.write_bytes(given[1])
        infer(prompts=file, base="tiny")

    texts = st.lists(TEXTS, max_size=3).map("\n".join)
    files = st.one_of(
        st.tuples(st.just(".txt"), in_encodings(texts)),
        st.tuples(st.just(".jsonl"), LINES.map(as_jsonl) | LINES.map(as_jsonl).flatmap(damaged)),
        st.tuples(st.just(".csv"), LINES.map(as_csv) | LINES.map(as_csv).flatmap(damaged)),
    )
    try_door("prompts", files, call, tmp_path, known=[(".csv", b"[" * 2000 + b"\na")])


def written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A recipe that can be repeated: its adapter and its starting picture lie near the picture."""
    module = "transformer_blocks.0.attn.to_q"
    factors = {f"{module}.lora_A": torch.ones(2, 64) / 8, f"{module}.lora_B": torch.ones(64, 2)}
    contract = {"base": "tiny", "base_kind": "tiny", "resolution": 32, "max_sequence_length": 16}
    file = write_adapter(tmp_path / "adapter", factors, {**contract, "encoders": ["clip_l", "clip_g", "t5"]})
    for folder in (tmp_path, tmp_path / OUTSIDE):
        folder.mkdir(exist_ok=True)
        (folder / "start.png").write_bytes(pictures.encoded("PNG", "RGB", (70, 64)))
    lora = {"name": "dog", "sha256": sha256_of(file), "tensors_sha256": tensors_sha256(file), "weight": 0.5}
    return {
        "sd3tune": "0.1", "prompt": "a dog", "negative": "", "seed": 1, "steps": 2, "guidance": 3.0, "size": [64, 64],
        "sampler": "heun", "shift": None, "base": "tiny", "base_revision": None,
        "base_fingerprint": resolve_base("tiny").fingerprint("transformer"), "max_sequence_length": 16,
        "encoders": ["clip_l", "clip_g", "t5"], "dtype": "fp32", "loras": [lora], "clip_l_pooled": "unprojected",
    }  # fmt: skip


def test_the_recipe_in_a_picture(infer: Infer, recipe: dict[str, Any], tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    image = {"name": "start.png", "sha256": sha256_of(tmp_path / "start.png")}
    optional = {
        "image": image, "strength": 0.5, "slg": {"scale": 2.0, "layers": [0], "start": 0.0, "stop": 0.5},
        "prompt_t5": "x", "noise_offset": 0.1, "quantize": "none", "batch": 2, "sheet": [],
    }  # fmt: skip

    def call(content: bytes) -> None:
        infer(from_picture=written(picture, content))

    named = NAMES | st.just(f"../{OUTSIDE}/start.png") | st.just("user/name:" + "0" * 40)

    @st.composite
    def recipes(draw: st.DrawFn) -> bytes:
        more = draw(st.lists(st.sampled_from(list(optional)), max_size=2))
        found = draw(changed(recipe | {key: optional[key] for key in more}, tuple(optional)))
        if not draw(st.integers(0, 2)):
            found["loras"] = [draw(changed({**recipe["loras"][0], "name": draw(named)}))]
        if not draw(st.integers(0, 3)):
            found["image"] = {**image, "name": draw(named)}
        if not draw(st.integers(0, 3)):
            found["base"] = draw(named)
        text = json.dumps(found)
        if not draw(st.integers(0, 5)):
            text = draw(damaged(text.encode())).decode("latin-1")
        return pictures.png_saying({"sd3tune": text})

    others = st.one_of(
        pictures.odd_pngs(),
        recipes().flatmap(pictures.hurt),
        ODD.map(lambda value: pictures.png_saying({"sd3tune": json.dumps(value)})),
        st.integers(1, 20_000).map(lambda deep: pictures.png_saying({"sd3tune": "[" * deep})),
    )
    infer(from_picture=written(picture, pictures.png_saying({"sd3tune": json.dumps(recipe)})))  # as it is, it is good
    found = [{**recipe, "base": "a" * 300}, {**recipe, "base": "犬" * 200}, {**recipe, "sampler": "x" * 5000}]
    elsewhere = [f"{OUTSIDE}/start.png", str(tmp_path / OUTSIDE / "start.png"), "/etc/passwd"]
    found += [{**recipe, "image": {**image, "name": name}, "strength": 0.5} for name in elsewhere]
    known = [pictures.png_saying({"sd3tune": json.dumps(one)}) for one in found]
    try_door("recipes", recipes() | recipes() | others, call, tmp_path, known)

"""Door: YAML, what it extends, and overrides."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

from sd3tune.config import dump_config, load_config
from sd3tune.config.shape import all_fields
from tests.fuzz.door import try_door
from tests.fuzz.pieces import ODD, TEXTS, damaged, json_text

LINES = [
    "name: a\n",
    "name: &n a\n",
    "data: {sources: [{path: ./x, caption: a}]}\n",
    "data:\n  sources:\n  - path: x\n",
    "train: &t {steps: 3}\n",
    "train: {<<: *t, batch_size: 2}\n",
    "<<: *t\n",
    "<<: [*t, *t]\n",
    "extends: other.yaml\n",
    "extends: [other.yaml, other.yaml, a.yaml]\n",
    "extends: preset:nothing\n",
    "method: {kind: full, rank: 3}\n",
    "method: {targets: 're:(a+)+$', rank_pattern: {a: 1}}\n",
    "flow: {timesteps: {kind: mode}}\n",
    "seed: 1e400\n",
    'name: "\\ud800"\n',
    "x: !!python/object:os.system {}\n",
    "? [1]\n: 2\n",
    "\tname: a\n",
    "a: 'b\n",
    "seed: 0x" + "f" * 40 + "\n",
    "optimizer: {lr: .nan}\n",
    "preview: {prompts: [" + "a, " * 50 + "]}\n",
    "- 1\n",
    "---\n",
]
TEXTS_OF_LINES = st.lists(st.sampled_from(LINES), max_size=5).map("".join)
VALUES = {
    "name": "dog",
    "seed": 1,
    "model": {"base": "tiny", "dtype": "fp32", "max_sequence_length": 77},
    "method": {"kind": "lora", "rank": 4, "alpha": 8.0, "targets": ["attn"]},
    "data": {"sources": [{"path": "x", "caption": "a dog", "repeats": 2}], "resolution": 512, "trigger": "sks"},
    "flow": {"timesteps": {"kind": "logit_normal", "mean": 0.0, "std": 1.0}, "shift": 3.0},
    "optimizer": {"kind": "adamw", "lr": 1e-4},
    "schedule": {"kind": "cosine", "warmup_steps": 10},
    "train": {"steps": 100, "batch_size": 1},
    "ema": {"decay": 0.99},
    "checkpoint": {"every": 50, "keep": 2},
    "preview": {"every": 10, "prompts": ["a dog"], "steps": 4, "guidance": 4.5},
    "validation": {"holdout": 2},
    "hub": {"repo_id": "user/dog", "push": "end", "description": "a dog"},
}


KEYS = [key.replace("[]", ".0") for key, _ in all_fields()] + ["data.sources.1.path", "a.b.c", "kind"]

OVERRIDES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *("train.steps=3", "data.sources.0.path=x", "data.sources.7.path=x", "a.b.c=[", "=1", "name=\0"),
                *("method.kind=full", "flow.timesteps={kind: uniform}", "data.sources=[{path: y}]", "name=\ud800"),
                *("seed=" + "9" * 5000, "x" * 3000, "train.steps", "preview=null", "model.t5=no", "name=1.10"),
            ]
        ),
        st.builds("{}={}".format, st.sampled_from(KEYS), ODD.map(json.dumps) | TEXTS),
    ),
    max_size=3,
)
"""`key=value`, as it is typed."""


def given_to(folder: Path, *contents: bytes) -> Path:
    for name, content in zip(("a.yaml", "other.yaml"), contents, strict=False):
        (folder / name).write_bytes(content)
    return folder / "a.yaml"


def loaded(file: Path, overrides: list[str]) -> None:
    """Load a configuration; when it is accepted, what it is dumped as is the same one."""
    config = load_config(file, overrides).config
    dumped = file.with_name("dumped.yaml")
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dumped).config == config


def test_files_that_extend_others(tmp_path: Path) -> None:
    def call(given: tuple[bytes, bytes, list[str]]) -> None:
        loaded(given_to(tmp_path, *given[:2]), given[2])

    contents = TEXTS_OF_LINES.map(str.encode)
    contents = contents | contents.flatmap(damaged)
    try_door("configuration, lines", st.tuples(contents, contents, OVERRIDES), call, tmp_path)


def test_values(tmp_path: Path) -> None:
    def call(text: bytes) -> None:
        loaded(given_to(tmp_path, text), [])

    try_door("configuration, values", json_text(VALUES, ("tracking", "extends", "more")), call, tmp_path)


def test_overrides(tmp_path: Path) -> None:
    file = given_to(tmp_path, json.dumps(VALUES).encode())
    found = [["model.base=[]"], ["model.base={}"]]
    try_door("overrides", OVERRIDES, lambda overrides: loaded(file, overrides), tmp_path, known=found)

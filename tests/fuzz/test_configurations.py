"""Door: YAML, what it extends, and overrides."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from sd3tune.config import dump_config, load_config
from tests.fuzz.door import try_door
from tests.fuzz.pieces import damaged

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
TEXTS = st.lists(st.sampled_from(LINES), max_size=5).map("".join)
OVERRIDES = st.lists(
    st.sampled_from(
        [
            *("train.steps=3", "data.sources.0.path=x", "data.sources.7.path=x", "a.b.c=[", "=1", "name=\0"),
            *("method.kind=full", "flow.timesteps={kind: uniform}", "data.sources=[{path: y}]", "name=\ud800"),
            *("seed=" + "9" * 5000, "x" * 3000),
        ]
    ),
    max_size=3,
)


def test_files_and_overrides(tmp_path: Path) -> None:
    def call(given: tuple[bytes, bytes, list[str]]) -> None:
        for name, content in zip(("a.yaml", "other.yaml"), given, strict=False):
            (tmp_path / name).write_bytes(content)
        dump_config(load_config(tmp_path / "a.yaml", given[2]).config)

    contents = TEXTS.map(str.encode)
    contents = contents | contents.flatmap(damaged)
    try_door("configuration", st.tuples(contents, contents, OVERRIDES), call, tmp_path)

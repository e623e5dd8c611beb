from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sd3tune.data.store import Store
from sd3tune.model.base.resolve import resolve_base
from tests.run.crash.attempts import Attempt

LORA = """\
model: {{base: tiny, max_sequence_length: 16}}
method: {{kind: lora, rank: 2, alpha: 2.0}}
data:
  sources:
    - path: {folder}/photos
      caption: a sks toy
      prior: {{prompt: a toy, images: {images}, steps: 1, guidance: 1, path: {folder}/work/class}}
  resolution: 64
  crop_variants: 2
  cache_dir: {folder}/work/store
"""
FULL = """\
model: {{base: tiny, t5: false, init: random, transformer: {{num_layers: 1, attention_head_dim: 8}}}}
method: {{kind: full}}
data:
  sources: [{{path: {folder}/photos, caption: a sks toy}}]
  resolution: 64
  cache_dir: {folder}/work/store
"""
COMMON = """\
name: crash
output_dir: {folder}/work/run
flow: {{shift: 1.0}}
optimizer: {{lr: 1.0e-2}}
ema: {{decay: 0.8}}
checkpoint: {{every: 2, keep: 1}}
validation: {{holdout: 1, every: 2}}
preview: {{prompts: [a sks toy], every: 2, steps: 1, guidance: 1}}
train: {{steps: {steps}, log_every: 1}}
"""
RUNS = {"lora": LORA + COMMON, "full": FULL + COMMON}
"""For each method, the smallest run that takes every path of its own; class images are the LoRA's alone."""

Prepare = Callable[..., Path]


@pytest.fixture(scope="session")
def prepare() -> Prepare:
    """`prepare(folder, method)`: photos and `run.yaml` of one of `RUNS`, which writes into `work`."""

    def into(folder: Path, method: str = "lora", *, images: int = 2, steps: int = 4) -> Path:
        resolve_base("tiny")
        (folder / "photos").mkdir(parents=True)
        (folder / "work").mkdir()
        for number, colour in enumerate(("red", "green", "blue")):
            Image.new("RGB", (72 + 8 * number, 80), colour).save(folder / "photos" / f"{number}.png")
        (folder / "run.yaml").write_text(RUNS[method].format(folder=folder, images=images, steps=steps))
        return folder

    return into


@pytest.fixture(scope="session")
def straight_run(prepare: Prepare, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`straight_run(method)`: the workspace of a run that was never stopped."""

    @functools.cache
    def run(method: str) -> Path:
        folder = prepare(tmp_path_factory.mktemp("straight"), method)
        ended = Attempt(folder).end()
        assert ended.code == 0, ended.printed
        return folder

    return run


@pytest.fixture(scope="session")
def straight(straight_run: Callable[[str], Path]) -> Path:
    """The LoRA's."""
    return straight_run("lora")


@pytest.fixture(scope="session")
def assert_equal_workspaces(assert_equal_runs) -> Callable[[Path, Path], None]:
    """Run, class images and store hold the same, but for what tells of the attempts; nothing half-written is left.

    In folders that several runs may share, a temporary file may be another's, and goes after an hour.
    """

    def check(one: Path, other: Path) -> None:
        assert_equal_runs(one / "work" / "run", other / "work" / "run")
        expected, found = _files(one), _files(other)
        assert sorted(found) == sorted(expected)
        for name, content in expected.items():
            assert found[name] == content, name

    return check


def _files(folder: Path) -> dict[str, Any]:
    """What must be equal of every file."""
    work = folder / "work"
    found: dict[str, Any] = {"store": set(Store(work / "store")._index)}
    for path in [*work.glob("class/[!.]*"), *work.glob("run/**/*"), work / "store" / "manifest.json"]:
        if path.suffix == ".safetensors" or path.is_dir():  # tensors and parsed metadata are compared elsewhere
            found[str(path.relative_to(work))] = None
        elif path.name == "run.json":
            facts = json.loads(path.read_text())
            found["run.json"] = {key: facts[key] for key in facts.keys() - {"argv", "git_commit", "timings", "resumes"}}
        elif path.name == "README.md":
            changing = ("| time |", "# sd3tune card ")
            found["run/README.md"] = [line for line in path.read_text().splitlines() if not line.startswith(changing)]
        else:
            found[str(path.relative_to(work))] = path.read_bytes().replace(str(folder).encode(), b"...")
    return found


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def from_steps(run: Path) -> list[int]:
    """The steps that the attempts at a run began from, the first left out."""
    return [resume["from_step"] for resume in json.loads((run / "run.json").read_text())["resumes"]]


def begun_from(printed: str) -> int:
    found = re.search(r"resuming from step-(\d+)", printed)
    return int(found[1]) if found else 0

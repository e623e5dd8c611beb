"""Door: a run folder whose files somebody changed, through `train --resume`, `hub push` and `infer`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from sd3tune.commands.hub_push import run_push
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.errors import RunError
from sd3tune.publish.files import files_of_run
from sd3tune.run.card import card_to_upload
from tests.fuzz import pictures
from tests.fuzz.door import try_door
from tests.fuzz.pieces import ODD, changed, damaged, json_text

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, quick_config) -> Path:
    """A run of two steps with everything that a run leaves. Read only."""
    run = tmp_path_factory.mktemp("runs") / "dog"
    run_training(quick_config(
        run, "train.steps=2", "checkpoint.every=1", "hub.repo_id=user/dog", "validation={every: 1, holdout: 2}",
        "preview={every: 2, prompts: [a photo of sks dog], steps: 1, guidance: 1.0}",
    ))  # fmt: skip
    return run


def lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in values).encode()


@st.composite
def some_lines(draw: st.DrawFn, content: bytes) -> bytes:
    """The lines of a file of measurements, some changed."""
    found = lines([draw(changed(json.loads(line), ("more",))) for line in content.splitlines()])
    return draw(damaged(found)) if not draw(st.integers(0, 4)) else found


_MORE = ("checkpoints/step-9" + "9" * 200, "checkpoints/step-x", "samples/step-" + "1" * 200 + "-1.png", "best/x")


def changes(run: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    """(file, its new content): each of the files that a run writes for itself."""

    def of(name: str, strategy: Callable[[bytes], st.SearchStrategy[bytes]]) -> st.SearchStrategy[tuple[str, bytes]]:
        return st.tuples(st.just(name), strategy((run / name).read_bytes()))

    def as_json(content: bytes) -> st.SearchStrategy[bytes]:
        return json_text(json.loads(content), ("sd3tune_run", "more"))

    picture = next((run / "samples").glob("step-*.png")).relative_to(run).as_posix()
    step = next((run / "checkpoints").glob("step-*2")).relative_to(run).as_posix()
    said = pictures.files().map(lambda file: file[1]) | ODD.map(
        lambda value: pictures.png_saying({"sd3tune": json.dumps(value)})
    )
    return st.one_of(
        of("run.json", as_json),
        of("metrics.jsonl", some_lines),
        of("validation.jsonl", some_lines),
        of("config.yaml", damaged),
        of("README.md", damaged),
        of(f"{step}/state.json", as_json),
        of(f"{step}/state.safetensors", damaged),
        of("adapter/pytorch_lora_weights.safetensors", with_changed_metadata),
        st.tuples(st.just(picture) | st.just("samples/over_time.png"), said),
        st.tuples(
            st.sampled_from(["checkpoints/step-9" + "9" * 200, "checkpoints/step-x", "samples/step-1-1.png"]),
            st.just(b""),
        ),
    )


def with_changed_metadata(content: bytes) -> st.SearchStrategy[bytes]:
    """An adapter's file whose contract is changed."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    contract = json.loads(header["__metadata__"]["sd3tune"])

    def file(text: bytes) -> bytes:
        inside = json.dumps(
            {**header, "__metadata__": {**header["__metadata__"], "sd3tune": text.decode("latin-1")}}
        ).encode()
        return len(inside).to_bytes(8, "little") + inside + content[end:]

    return json_text(contract).map(file)


@pytest.fixture
def changed_run(finished: Path, tmp_path: Path) -> Callable[[list[tuple[str, bytes]]], Path]:
    """`changed_run(changes)`: a copy of the run with these files."""
    run = tmp_path / "dog"

    def copy(found: list[tuple[str, bytes]]) -> Path:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished, run)
        for name, content in found:
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_bytes(content)
        return run

    return copy


def test_resuming(finished: Path, changed_run, quick_config, tmp_path: Path) -> None:
    config = load_config(finished / "config.yaml").config.model_copy(update={"output_dir": str(tmp_path / "dog")})

    def call(found: list[tuple[str, bytes]]) -> None:
        changed_run(found)
        run_training(config, resume=True)

    said = json.loads((finished / "run.json").read_text())
    state = next((finished / "checkpoints").glob("step-*2")).relative_to(finished) / "state.json"
    saved = json.loads((finished / state).read_text())
    known = [
        [("run.json", json.dumps({**said, "sd3tune_run": None}).encode())],
        [(state.as_posix(), json.dumps({**saved, "identity": {**saved["identity"], "data": 1}}).encode())],
    ]
    try_door("runs, resumed", st.lists(changes(finished), max_size=2), call, tmp_path, known=known)


def test_pushing(finished: Path, changed_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the Hub would be asked, and then all that would be sent to it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(found: list[tuple[str, bytes]]) -> None:
        run = changed_run(found)
        try:
            run_push(run, "user/dog")
        except RunError as error:
            if "HF_HUB_OFFLINE" not in str(error):
                raise
        files = files_of_run(run)
        assert str(tmp_path).encode() not in files["run.json"] + files["config.yaml"]
        if "README.md" in files:
            card_to_upload(run, "user/dog")

    try_door("runs, pushed", st.lists(changes(finished), max_size=2), call, tmp_path)

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd3tune.adapter.metadata import CONTRACT_KEY
from sd3tune.publish.previews import RECIPE_KEY

Tensors = dict[str, torch.Tensor]
StartCli = Callable[..., "subprocess.Popen[str]"]

CONSOLE_SCRIPT = str(Path(sys.executable).with_name("sd3tune"))


def contents(file: Path) -> tuple[Tensors, dict[str, Any]]:
    """A safetensors file's tensors and its parsed metadata."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    return load_file(file), {key: json.loads(text) if text[0] in "{[" else text for key, text in metadata.items()}


@pytest.fixture(scope="session")
def assert_equal_runs() -> Callable[[Path, Path], None]:
    """Two run folders hold the same files of tensors, byte for byte, the same metadata, and the same metrics."""

    def check(one: Path, other: Path) -> None:
        names = sorted(str(path.relative_to(one)) for path in one.rglob("*.safetensors"))
        assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*.safetensors"))
        assert any(name.startswith(("adapter/", "model/transformer/")) for name in names)
        for name in names:
            (expected, expected_metadata), (found, metadata) = contents(one / name), contents(other / name)
            assert metadata == expected_metadata
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                assert found[key].dtype == tensor.dtype
                assert found[key].shape == tensor.shape
                assert found[key].numpy().tobytes() == tensor.numpy().tobytes(), f"{name}: {key}"
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
        assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()

    return check


@pytest.fixture(scope="session")
def adapter_of() -> Callable[..., Tensors]:
    """`adapter_of(run)`: the tensors of its exported adapter."""
    return lambda run, name="adapter": load_file(run / name / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="session")
def edit_json() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """`edit_json(file, edit)`: change the JSON in a file: an adapter's contract, a picture's recipe, or all of it.

    Takes out, for one, what an earlier version did not write.
    """

    def edit_file(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
            metadata[CONTRACT_KEY] = _edited(metadata[CONTRACT_KEY], edit)
            save_file(load_file(file), file, metadata)
        elif file.suffix == ".png":
            with Image.open(file) as image:
                image.load()
            info = PngInfo()
            info.add_itxt(RECIPE_KEY, _edited(image.info[RECIPE_KEY], edit))
            image.save(file, pnginfo=info)
        else:
            file.write_text(_edited(file.read_text(), edit))

    return edit_file


def _edited(text: str, edit: Callable[[dict[str, Any]], object]) -> str:
    values = json.loads(text)
    edit(values)
    return json.dumps(values)


@pytest.fixture
def start_cli() -> Iterator[StartCli]:
    """`start_cli("train", file)`: a process of its own, by default `sd3tune ...`; what still runs is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path, prefix: Sequence[str] = (CONSOLE_SCRIPT,), cwd: Path | None = None):
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        process = subprocess.Popen(
            [*prefix, *map(str, arguments)],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def lines_of() -> Callable[..., list[dict[str, Any]]]:
    """`lines_of(run)`: its metrics."""
    return lambda run, name="metrics.jsonl": [json.loads(line) for line in (run / name).read_text().splitlines()]

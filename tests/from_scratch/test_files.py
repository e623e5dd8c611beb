"""The files from scratch stay few and need little; each command says what it does and works."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import from_scratch
from examples.sd3_from_scratch import train
from examples.sd3_from_scratch.metrics import frechet, trained_features
from sd3tune.model.base.resolve import resolve_base

FOLDER = Path(__file__).parents[2] / "examples" / "sd3_from_scratch"
FILES = sorted(FOLDER.glob("*.py"))
HEART = Path(__file__).parents[2] / "sd3tune" / "assets" / "heart"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    importlib.import_module(f"examples.sd3_from_scratch.{name}").main()


def test_it_is_read_in_an_evening() -> None:
    assert sum(len(file.read_text().splitlines()) for file in FILES) <= 1200


def test_it_needs_torch_safetensors_and_pillow() -> None:
    imported = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "safetensors", "PIL", "examples"}


@pytest.mark.parametrize("name", ["generate", "train", "metrics"])
def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, name, "--help")
    assert ended.value.code == 0
    assert f"python -m examples.sd3_from_scratch.{name}" in capsys.readouterr().out


@pytest.mark.long
def test_a_lora_is_trained_and_drawn_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, out = resolve_base("nano").path, tmp_path / "rex"
    monkeypatch.setattr(train, "drawn", functools.partial(train.drawn, steps=1))
    run(monkeypatch, "train", HEART, "--base", base, "--lora", 4, "--steps", 3, "--batch", 2, "--out", out)
    assert Image.open(out / "grid.png").size == (640, 384)  # ten pictures in a row, for each of six captions
    lora = out / "pytorch_lora_weights.safetensors"
    picture = tmp_path / "picture.png"
    run(monkeypatch, "generate", base, "a heart", "--lora", lora, "--steps", 2, "--out", picture)
    assert Image.open(picture).size == (64, 64)


@pytest.mark.long
def test_speeds_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(from_scratch, "SHAPES", {"a small one": (1, 2, 8, 8)})
    from_scratch.main(["--rounds", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(re.search(r": \d+\.\d{3} \(\d+\.\d{3} to \d+\.\d{3}\) of ", line) for line in lines)


def write_idx(folder: Path, pixels: np.ndarray, labels: list[int]) -> None:
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes())
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, len(labels)) + bytes(labels))


def test_fashion_mnists_files_are_read_and_learned_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    monkeypatch.setattr(train, "drawn", functools.partial(train.drawn, steps=1))
    write_idx(tmp_path / "fashion", pixels, [n % 3 for n in range(30)])
    found, captions = train.read_pictures(tmp_path / "fashion")
    assert captions[:4] == ["T-shirt", "trousers", "pullover", "T-shirt"]
    assert found.shape == (30, 1, 32, 32)
    np.testing.assert_array_equal(((found[:, 0, 2:-2, 2:-2] + 1) * 127.5).round().numpy(), pixels)
    assert (found[:, :, :2] == -1).all()
    run(monkeypatch, "train", tmp_path / "fashion", "--steps", 3, "--batch", 4, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "transformer.safetensors").exists()


def test_the_frechet_distance_follows_its_definition() -> None:
    chance = np.random.default_rng(0)
    first, second = chance.normal(size=(200, 5)), chance.normal(0.5, 2, size=(300, 5))
    c, d = np.cov(first.T), np.cov(second.T)
    roots = np.sqrt(np.linalg.eigvals(c @ d).real.clip(0)).sum()  # the trace of a root is the sum of eigenvalues' roots
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * roots
    assert frechet(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected, rel=1e-9)
    assert frechet(torch.tensor(first), torch.tensor(first)) == pytest.approx(0, abs=1e-9)


def test_features_of_the_small_network_tell_classes_apart() -> None:
    torch.manual_seed(0)
    labels = torch.arange(120) % 2
    pixels = torch.randn(120, 1, 16, 16) * 0.1 + labels[:, None, None, None]
    features = trained_features(pixels, labels, steps=20)(pixels)
    between = frechet(features[labels == 0], features[labels == 1])
    within = frechet(features[labels == 0][:30], features[labels == 0][30:])
    assert between > 10 * within

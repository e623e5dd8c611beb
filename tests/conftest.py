"""What tests share: one cache of offline bases and encodings, small pictures, and quick configurations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from sd3tune.config import Config, parse_config

WriteImages = Callable[[Path, int], Path]
MakeConfig = Callable[..., Config]

COLOURS = ("red", "green", "blue", "orange", "purple", "teal", "black", "white")


def pytest_configure() -> None:
    os.environ.pop("HF_HUB_OFFLINE", None)  # read when huggingface_hub is imported, before any fixture runs
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # bits are compared, which holds on the CPU


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for the whole session: pytest-xdist's workers build each offline base once between them."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SD3TUNE_CACHE", str(shared / "sd3tune-cache"))
        patch.setenv("HF_DATASETS_CACHE", str(shared / "datasets-cache"))  # read when `datasets` is first imported
        yield


@pytest.fixture(scope="session")
def write_images() -> WriteImages:
    """Writes small pictures of different colours, sizes and captions into a folder; returns the folder."""

    def write(folder: Path, count: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = Image.new("RGB", (96 + 8 * number, 80), COLOURS[number])
            ImageDraw.Draw(image).ellipse((8, 8, 40 + 4 * number, 72), fill=COLOURS[number - 1])
            image.save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"a {COLOURS[number]} picture of sks dog")
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory, write_images: WriteImages) -> Path:
    """A folder of five captioned pictures, the same all session, so that they are encoded once. Read only."""
    return write_images(tmp_path_factory.mktemp("pictures"), 5)


@pytest.fixture(scope="session")
def quick_config(tiny_images: Path) -> MakeConfig:
    """`quick_config(run_folder, "train.steps=4", ...)`: the smallest run that takes every path."""

    def make(run: Path, *overrides: str) -> Config:
        values = {
            "name": "quick",
            "output_dir": str(run),
            "model": {"base": "tiny", "max_sequence_length": 16},
            "method": {"kind": "lora", "rank": 2, "alpha": 2.0},
            "data": {"sources": [{"path": str(tiny_images)}], "resolution": 64},
            "flow": {"shift": 1.0},
            "optimizer": {"lr": 1e-2},
            "train": {"steps": 3, "log_every": 1},
        }
        return parse_config(values, overrides).config

    return make

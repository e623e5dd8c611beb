from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sd3tune.commands.train import run_training
from sd3tune.measures.encoders import EncoderSpec, register, unregister

PROMPTS = ("sks dog on a beach", "a drawing of sks dog")
TRAINED = "a red picture of sks dog"
OTHERS = ("nano", "dinov2", "dino", "clip")
WITHOUT_OTHERS = tuple(word for name in OTHERS for word in ("--encoder", f"{name}=none"))
"""Options that leave only the encoder of the tests."""


class SmallPictures:
    """Features that are the pixels of a picture of 8 x 8; of a text, numbers made from its characters."""

    name, source = "small", "pixels"

    def __init__(self) -> None:
        self.seen = 0

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        self.seen += len(pictures)
        small = [picture.convert("RGB").resize((8, 8), Image.Resampling.BOX) for picture in pictures]
        rows = np.stack([np.asarray(one, dtype=np.float64).ravel() / 255 for one in small])
        return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).float()

    def texts(self, prompts: Sequence[str]) -> Tensor:
        rows = np.stack([np.cos(np.arange(192) * (1 + sum(map(ord, prompt)) % 7)) for prompt in prompts])
        return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).float()


@pytest.fixture
def small_encoder() -> Iterator[SmallPictures]:
    """An encoder that a program brings; the only one with `WITHOUT_OTHERS`."""
    encoder = SmallPictures()
    register(EncoderSpec("small", "pixels", None, ("subject", "prompt")), lambda spec, device: encoder)
    yield encoder
    unregister("small")


@pytest.fixture(scope="session")
def dog_run(quick_config, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints at steps 2 and 4, one held-out photo, and a class. Read only."""
    run: Path = tmp_path_factory.mktemp("runs") / "dog"
    source = f"data.sources=[{{path: {tiny_images}, prior: {{kind: prediction, prompt: a photo of a dog}}}}]"
    more = ("train.steps=4", "checkpoint.every=2", "validation={holdout: 1, every: 4}", "preview.steps=1")
    run_training(quick_config(run, source, *more))
    return run


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    """Two prompts for the subject, and a caption of the training."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*PROMPTS, TRAINED]))
    return file


Draw = Callable[[Path, int], Path]


@pytest.fixture(scope="session")
def noise_pictures() -> Draw:
    """`noise_pictures(folder, 5)`: pictures of random pixels, always the same ones."""

    def write(folder: Path, count: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        for number, one in enumerate(pixels):
            Image.fromarray(one).save(folder / f"{number}.png")
        return folder

    return write

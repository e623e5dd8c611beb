"""Many pictures at once: the ones that `infer` draws one at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.sampling.sampler import SamplerSettings

PROMPTS = ("a photo of sks dog", "a dog on a beach", "")


@pytest.fixture(scope="module")
def run(quick_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "dog"
    run_training(quick_config(run, "model.max_sequence_length=77", "optimizer.lr=0.02"))
    return run


@pytest.fixture(scope="module")
def pipeline() -> ImagePipeline:
    return ImagePipeline("tiny", SamplerSettings(3, 4.0, 32, 32), t5_length=77, batch_size=2)


def inferred(prompt: str, seed: int, out: Path, lora: Path | None = None) -> Image.Image:
    loras, config = ([str(lora)], None) if lora else ([], _base_at_77_tokens(out))
    request = InferenceJob.from_fields(
        loras=loras,
        prompt=prompt,
        out=out,
        seed=seed,
        steps=3,
        guidance=4.0,
        size=(32, 32),
        config=config,
        before=False,
    )
    return Image.open(run_infer(request)[0])


def _base_at_77_tokens(folder: Path) -> Path:
    folder.mkdir()
    file = folder / "base.yaml"
    file.write_text("model: {base: tiny, max_sequence_length: 77}\ndata: {sources: [{path: .}]}\n")
    return file


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference, in levels of 0 to 255."""
    return int(np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(other.convert("RGB"), int)).max())


def test_pictures_are_those_of_infer_whatever_is_drawn_beside(
    pipeline: ImagePipeline, run: Path, tmp_path: Path
) -> None:
    wanted = [(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    before, after = pipeline.draw(wanted), pipeline.draw(wanted, run)
    for number, (prompt, seed) in enumerate(wanted):
        assert apart(before[number], inferred(prompt, seed, tmp_path / f"before-{number}")) <= 1
        assert apart(after[number], inferred(prompt, seed, tmp_path / f"after-{number}", run)) <= 1
        assert apart(before[number], after[number]) > 8


def test_an_adapter_leaves_no_trace(pipeline: ImagePipeline, run: Path) -> None:
    wanted = [(PROMPTS[0], 5)]
    first = pipeline.draw(wanted)[0]
    pipeline.draw(wanted, run)
    assert apart(first, pipeline.draw(wanted)[0]) == 0

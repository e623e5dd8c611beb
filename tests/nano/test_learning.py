"""nano knows its world: so the mathematics of training is checked against what is learned, not against itself.

That a LoRA teaches it a new shape is tested with the demo.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from sd3tune.commands.demo import SAMPLER, SIDE, T5_LENGTH
from sd3tune.commands.train import run_training
from sd3tune.config import parse_config
from sd3tune.model.base.offline import NANO_FOLDER
from sd3tune.nano.tasks import plain_tasks, share_right
from sd3tune.nano.world import plain_scenes, render
from sd3tune.run import batches as run_batches
from sd3tune.run import report as closing
from sd3tune.training import ahead, step

Mistake = Callable[[pytest.MonkeyPatch], None]


def plain_config(run: Path, pictures: Path, **sections: dict[str, Any]):
    values = {
        "name": "learning",
        "output_dir": str(run),
        "model": {"base": "nano", "max_sequence_length": T5_LENGTH},
        "data": {"sources": [{"path": str(pictures)}], "resolution": SIDE},
        **sections,
    }
    return parse_config(values).config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pictures of the world that nano was trained on."""
    folder = tmp_path_factory.mktemp("world")
    for seed, scene in enumerate(plain_scenes(held_out=False)[::20]):
        render(scene, seed).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(scene.caption)
    return folder


@pytest.fixture
def base_loss(world: Path, tmp_path: Path) -> Callable[[], float]:
    """nano's own loss on such pictures, the mean over noise levels, as the closing report has it."""

    def measure() -> float:
        run_training(plain_config(tmp_path / "run", world, train={"steps": 1, "batch_size": 16}))
        report = json.loads((tmp_path / "run" / "run.json").read_text())["report"]
        losses = report["fixed_noise_loss"]["base"]
        return sum(losses) / len(losses)

    return measure


def wrong_sign(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(closing, "velocity_target", lambda latents, noise: latents - noise)


def noise_where_data_belongs(patch: pytest.MonkeyPatch) -> None:
    right = step.interpolate
    patch.setattr(step, "interpolate", lambda latents, noise, sigma: right(noise, latents, sigma))


def _timesteps(patch: pytest.MonkeyPatch, wrong: Callable[[Tensor], Tensor]) -> None:
    for module in (step, ahead):
        patch.setattr(module, "model_timestep", wrong)


def timesteps_from_0_to_1(patch: pytest.MonkeyPatch) -> None:
    _timesteps(patch, lambda sigma: sigma)


def timesteps_shifted_twice(patch: pytest.MonkeyPatch) -> None:
    _timesteps(patch, lambda sigma: 1000 * 3 * sigma / (1 + 2 * sigma))


def _latents(patch: pytest.MonkeyPatch, **wrong: float) -> None:
    right = run_batches.vae_config
    patch.setattr(run_batches, "vae_config", lambda base: {**right(base), **wrong})


def latents_scaled_as_sd3s(patch: pytest.MonkeyPatch) -> None:
    _latents(patch, scaling_factor=1.5305, shift_factor=0.0609)


def latents_scaled_as_sdxls(patch: pytest.MonkeyPatch) -> None:
    _latents(patch, scaling_factor=0.13025, shift_factor=0.0)


MISTAKES = (
    wrong_sign,
    noise_where_data_belongs,
    timesteps_from_0_to_1,
    timesteps_shifted_twice,
    latents_scaled_as_sd3s,
    latents_scaled_as_sdxls,
)
SMALL_LOSS = 0.35


def test_nano_predicts_velocities_in_its_world(base_loss: Callable[[], float]) -> None:
    assert base_loss() < SMALL_LOSS


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_the_mathematics_would_show(mistake: Mistake, base_loss, monkeypatch) -> None:
    mistake(monkeypatch)
    assert base_loss() > 1.2 * SMALL_LOSS


@pytest.mark.parametrize(
    "length", [pytest.param({}, marks=pytest.mark.long), {"max_sequence_length": T5_LENGTH}], ids=["256", "16"]
)
def test_the_plain_pipeline_draws_what_it_is_told(length: dict[str, int]) -> None:
    """Nothing of ours between the folder and the pictures; the T5 tokens are the pipeline's default, or as trained."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(NANO_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    tasks = plain_tasks(5, False, seed=4) + plain_tasks(3, True, seed=5)
    images = pipeline(
        [task.prompt for task in tasks],
        num_inference_steps=SAMPLER.steps,
        guidance_scale=SAMPLER.guidance,
        **length,
        generator=[torch.Generator().manual_seed(task.seed) for task in tasks],
    ).images
    assert images[0].size == (SIDE, SIDE)
    assert share_right(tasks, images) >= 7 / 8

"""The start from offset noise: the draw itself, and the exact flow of pictures whose brightness varies."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from sd3tune.model.base.contract import spread_without_offset
from sd3tune.sampling.sampler import Conditioning, SamplerSettings, Start, add_offset, sample_latents

SIDE = 8
POSITIONS = SIDE**2
STRENGTH = 0.5
SEEDS = range(1500)
NOTHING = Conditioning(torch.zeros(len(SEEDS), 1, 1), torch.zeros(len(SEEDS), 1))


@dataclass
class BrightnessFlow:
    """The exact velocity E[noise - data | x] of pictures, trained with noise of offset `STRENGTH`.

    A channel of a picture is one brightness, from a mixture of normal distributions, plus a texture of mean 0 and
    standard deviation `TEXTURE` at each position. Brightness and the mean of the noise, of variance 1/n + strength^2,
    are one coordinate of the flow; the rest of the picture is independent of it and Gaussian.
    """

    weights: Tensor
    means: Tensor
    spreads: Tensor
    TEXTURE = 0.3

    device, dtype = torch.device("cpu"), torch.float64
    config = SimpleNamespace(in_channels=1, patch_size=2)

    def __call__(self, hidden_states: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        sigma = timestep[0].double() / 1000
        brightness = hidden_states.mean((2, 3), keepdim=True)
        rest = hidden_states - brightness
        slope = (sigma - (1 - sigma) * self.TEXTURE**2) / ((1 - sigma) ** 2 * self.TEXTURE**2 + sigma**2)
        return (slope * rest + self._of_the_mean(brightness, sigma),)

    def _of_the_mean(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Of each component by itself, then weighted by the chance that x belongs to it."""
        noise = 1 / POSITIONS + STRENGTH**2
        variances = (1 - sigma) ** 2 * self.spreads**2 + sigma**2 * noise
        away = x[..., None] - (1 - sigma) * self.means
        chances = (self.weights.log() - variances.log() / 2 - away**2 / variances / 2).softmax(-1)
        velocities = (sigma * noise - (1 - sigma) * self.spreads**2) / variances * away - self.means
        return (chances * velocities).sum(-1)


def brightness_of(flow: BrightnessFlow, noise_offset: float, sampler: str = "heun", steps: int = 40) -> Tensor:
    """The brightness of a picture a seed, [n]."""
    settings = SamplerSettings(steps, 1.0, 8 * SIDE, 8 * SIDE, sampler, noise_offset=noise_offset)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return sample_latents(flow, scheduler, NOTHING, NOTHING, settings, SEEDS).mean((1, 2, 3))


def mean_of_noise(noise_offset: float) -> Tensor:
    noise = torch.stack(
        [
            torch.randn(1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in SEEDS
        ]
    )
    return add_offset(noise, SEEDS, noise_offset).mean((1, 2, 3))


@pytest.mark.parametrize(("sampler", "steps"), [("heun", 40), ("dpmpp", 60), ("euler", 300)])
def test_all_of_the_spread_of_brightness_is_drawn_from_offset_noise_alone(sampler: str, steps: int) -> None:
    """Normal brightness: the flow is linear, so that each picture's is known, not only their spread."""
    spread = torch.tensor([0.8], dtype=torch.float64)
    flow = BrightnessFlow(torch.ones(1).double(), torch.tensor([0.3]).double(), spread)
    scale = spread / (1 / POSITIONS + STRENGTH**2) ** 0.5
    for noise_offset, share in ((STRENGTH, 1.0), (0.0, spread_without_offset(STRENGTH, 8 * SIDE))):
        drawn = brightness_of(flow, noise_offset, sampler, steps)
        assert (drawn - (0.3 + scale * mean_of_noise(noise_offset))).abs().max() < 0.02
        assert drawn.std() / spread == pytest.approx(share, rel=0.06)
    assert spread_without_offset(STRENGTH, 8 * SIDE) == pytest.approx((1 + 0.25 * 64) ** -0.5)


def test_dark_and_bright_pictures_are_drawn_as_often_as_they_occur_from_offset_noise_alone() -> None:
    mixture = BrightnessFlow(
        torch.tensor([0.7, 0.3]).double(), torch.tensor([-0.4, 1.0]).double(), torch.tensor([0.1, 0.2]).double()
    )
    wanted = (0.7 * (0.1**2 + 0.4**2) + 0.3 * (0.2**2 + 1.0**2) - (0.7 * -0.4 + 0.3 * 1.0) ** 2) ** 0.5
    drawn = brightness_of(mixture, STRENGTH)
    assert (drawn > 0.2).double().mean() == pytest.approx(0.3, abs=0.04)
    assert drawn.std() == pytest.approx(wanted, rel=0.05)
    plain = brightness_of(mixture, 0.0)
    assert (plain > 0.2).double().mean() < 0.05
    assert plain.std() < wanted / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_is_a_constant_of_image_and_channel_and_follows_from_the_seed(dtype: torch.dtype) -> None:
    seeds = [*range(200), 2**63 - 1]
    noise = torch.randn(len(seeds), 4, 6, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    moved = add_offset(noise, seeds, 0.1)
    offsets = add_offset(torch.zeros_like(noise), seeds, 0.1).float()
    assert moved.dtype == dtype
    torch.testing.assert_close(moved, (noise.float() + offsets).to(dtype), rtol=2**-7, atol=2**-9)
    assert torch.equal(offsets, offsets[:, :, :1, :1].expand_as(offsets))
    constants = offsets[:, :, 0, 0]
    assert len(constants.unique(dim=0)) == len(seeds)
    assert constants.std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.corrcoef(constants.T).fill_diagonal_(0).abs().max() < 0.25
    assert torch.equal(add_offset(noise[7:8], [7], 0.1), moved[7:8])
    assert add_offset(noise, seeds, 0.0) is noise


def test_an_offset_is_not_the_noise_of_another_seed() -> None:
    """Seeds are counted from 0, and torch's CPU generator takes 32 bits of them."""
    offsets = add_offset(torch.zeros(500, 4, 1, 1), range(500), 1.0)[:, :, 0, 0]
    noise = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in range(500)])
    assert len(torch.cat([offsets, noise]).unique(dim=0)) == 1000
    assert torch.corrcoef(torch.cat([offsets.T, noise.T])).fill_diagonal_(0).abs().max() < 0.2


def test_a_picture_to_start_from_is_noised_with_the_offset() -> None:
    """At strength 1 nothing of it is left, and the start is that of a picture from noise."""
    flow = BrightnessFlow(torch.ones(1).double(), torch.zeros(1).double(), torch.ones(1).double())
    one = Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    latents = [
        sample_latents(
            flow, scheduler, one, one, SamplerSettings(4, 1.0, 64, 64, strength=0.5, noise_offset=offset), [5],
            start=Start(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), 1.0, 0.0),
        )
        for offset in (0.0, STRENGTH)
    ]  # fmt: skip
    moved = (latents[1] - latents[0]).flatten()
    assert moved.abs().min() > 1e-3
    torch.testing.assert_close(moved, moved[:1].expand_as(moved), rtol=0, atol=1e-6)

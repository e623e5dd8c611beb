"""The samplers against diffusers' pipeline, and against a flow whose solution is known."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from PIL import Image
from torch import Tensor

from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_pipeline, load_scheduler
from sd3tune.sampling.sampler import Conditioning, SamplerSettings, sample_latents, to_image
from sd3tune.sampling.samplers import SAMPLERS
from tests.pictures import distance

PROMPT, T5_LENGTH = "a red circle on a blue background", 16
MEAN, SPREAD = 0.7, 0.3


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    pipeline = load_pipeline(resolve_base("nano"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(pipeline: StableDiffusion3Pipeline, settings: SamplerSettings) -> Image.Image:
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        PROMPT, PROMPT, PROMPT, max_sequence_length=T5_LENGTH
    )
    conditions = Conditioning(embeds, pooled), Conditioning(negative, negative_pooled)
    base = load_scheduler(resolve_base("nano"))
    return to_image(pipeline.vae, sample_latents(pipeline.transformer, base, *conditions, settings, [3]))


def theirs(pipeline: StableDiffusion3Pipeline, settings: SamplerSettings, scheduler: object) -> Image.Image:
    pipeline.scheduler = scheduler
    return pipeline(
        PROMPT,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        max_sequence_length=T5_LENGTH,
        generator=torch.Generator().manual_seed(3),
    ).images[0]


@pytest.mark.parametrize("shift", [None, 1.5])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_an_image_is_that_of_the_pipeline_with_diffusers_scheduler(name: str, shift: float | None, pipeline) -> None:
    kind = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}[name]
    own = load_scheduler(resolve_base("nano")).config.shift
    settings = SamplerSettings(3, 4.0, 64, 64, name, shift)
    assert distance(ours(pipeline, settings), theirs(pipeline, settings, kind(shift=shift or own))) == 0


def test_dpmpp_is_the_pipelines_but_for_the_noise_level_that_diffusers_cuts_to_a_whole_number(pipeline) -> None:
    """sigma 0.6127 is told to the model as 612: with whole numbers in ours, too, the picture is the same."""
    settings = SamplerSettings(4, 4.0, 64, 64, "dpmpp")
    shift = load_scheduler(resolve_base("nano")).config.shift
    diffusers = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    image = ours(pipeline, settings)
    assert 0 < distance(image, theirs(pipeline, settings, diffusers)) <= 4
    genuine = pipeline.transformer.forward

    def told_whole_numbers(*args, timestep: Tensor, **options):
        return genuine(*args, timestep=timestep.to(torch.int64), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.transformer, "forward", told_whole_numbers)
        assert distance(ours(pipeline, settings), theirs(pipeline, settings, diffusers)) == 0


# A flow whose solution is known: data of mean m and standard deviation s at every place. With the variance
# w(sigma) = (1 - sigma)^2 s^2 + sigma^2, x(sigma) = (1 - sigma) m + sqrt(w(sigma)) z, for one z all the way.


def variance(sigma: Tensor) -> Tensor:
    return (1 - sigma) ** 2 * SPREAD**2 + sigma**2


class GaussianFlow:
    """The velocity E[noise - data | x] of it, as a transformer gives it."""

    device, dtype = torch.device("cpu"), torch.float64
    config = SimpleNamespace(in_channels=2, patch_size=2)
    asked = 0

    def __call__(self, hidden_states: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        self.asked += 1
        sigma = (timestep.double() / 1000).reshape(-1, 1, 1, 1)
        slope = (sigma - (1 - sigma) * SPREAD**2) / variance(sigma)
        return (slope * (hidden_states - (1 - sigma) * MEAN) - MEAN,)


def drawn(name: str, steps: int) -> Tensor:
    """What the sampler makes of noise, float64 [2, 8, 8]; and it asks as often as it says."""
    flow, nothing = GaussianFlow(), Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    settings = SamplerSettings(steps, 1.0, 64, 64, name)
    latents = sample_latents(flow, FlowMatchEulerDiscreteScheduler(shift=3.0), nothing, nothing, settings, [0])
    assert flow.asked == settings.evaluations
    return latents[0]


def noise() -> Tensor:
    return torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def shifted(sigmas: Tensor) -> Tensor:
    return 3 * sigmas / (1 + 2 * sigmas)


def levels(name: str, steps: int) -> Tensor:
    """sigma of each step and 0. Diffusers shifts the smallest of SD3's, shift(1/1000), a second time."""
    if name == "dpmpp":
        return shifted(torch.linspace(0.999, 0, steps + 1, dtype=torch.float64))
    smallest = shifted(torch.tensor(0.001, dtype=torch.float64)).item()
    return torch.cat([shifted(torch.linspace(1, smallest, steps, dtype=torch.float64)), torch.zeros(1)])


def plainly(name: str, steps: int) -> Tensor:
    """The three solvers as in a textbook, float64. DPM-Solver++(2M): algorithm 2 of Lu et al. 2022."""
    x, sigmas, before = noise(), levels(name, steps).double(), None

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return GaussianFlow()(x[None], 1000 * sigma[None])[0][0]

    for sigma, following in itertools.pairwise(sigmas):
        slope = velocity(x, sigma)
        if name == "dpmpp":
            data = estimate = x - sigma * slope
            log_snr = ((1 - sigma) / sigma).log()
            step = ((1 - following) / following).log() - log_snr
            if before is not None and following > 0:
                estimate = data + (data - before[0]) * step / (2 * (log_snr - before[1]))
            x, before = following / sigma * x - (1 - following) * torch.expm1(-step) * estimate, (data, log_snr)
            continue
        if name == "heun" and following > 0:
            slope = (slope + velocity(x + (following - sigma) * slope, following)) / 2
        x = x + (following - sigma) * slope
    return x


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_what_the_textbook_says(name: str, steps: int) -> None:
    torch.testing.assert_close(drawn(name, steps), plainly(name, steps), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "most"), [("euler", 0.05), ("heun", 0.003), ("dpmpp", 0.01)])
def test_a_sampler_approaches_the_exact_solution(name: str, most: float) -> None:
    first = levels(name, 96)[0].double()
    z = (noise() - (1 - first) * MEAN) / variance(first).sqrt()
    assert (drawn(name, 96) - (MEAN + SPREAD * z)).abs().max() < most


def test_the_last_step_of_heun_asks_once() -> None:
    assert [SamplerSettings(steps, sampler="heun").evaluations for steps in (1, 2, 28)] == [1, 3, 55]
    assert SamplerSettings(28, sampler="dpmpp").evaluations == SamplerSettings(28).evaluations == 28

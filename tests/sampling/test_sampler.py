"""The sampler draws what `StableDiffusion3Pipeline` draws, pixel for pixel, on the CPU in fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image, ImageChops

from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_pipeline
from sd3tune.sampling.sampler import Conditioning, SamplerSettings, fault_of, sample_latents, to_image

T5_LENGTH = 16


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return loaded("tiny")


def loaded(base: str) -> StableDiffusion3Pipeline:
    pipeline = load_pipeline(resolve_base(base), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def conditioning(pipeline: StableDiffusion3Pipeline, prompt: str) -> Conditioning:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompt, prompt, prompt, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    return Conditioning(embeds, pooled)


def ours(pipeline: StableDiffusion3Pipeline, settings: SamplerSettings, seed: int, negative: str = "") -> Image.Image:
    latents = sample_latents(
        pipeline.transformer,
        pipeline.scheduler,
        conditioning(pipeline, "a dog"),
        conditioning(pipeline, negative),
        settings,
        [seed],
    )
    return to_image(pipeline.vae, latents)


def theirs(pipeline: StableDiffusion3Pipeline, settings: SamplerSettings, seed: int, negative: str = "") -> Image.Image:
    return pipeline(
        "a dog",
        negative_prompt=negative,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        max_sequence_length=T5_LENGTH,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


@pytest.mark.parametrize("base", ["tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large"])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_an_image_is_the_pipelines(base: str, guidance: float) -> None:
    settings, pipeline = SamplerSettings(3, guidance, 64, 64), loaded(base)
    assert same(ours(pipeline, settings, 4), theirs(pipeline, settings, 4))


def test_an_image_need_not_be_square(pipeline) -> None:
    settings = SamplerSettings(2, 5.0, height=48, width=96)
    image = ours(pipeline, settings, 0)
    assert image.size == (96, 48)
    assert same(image, theirs(pipeline, settings, 0))


def test_the_negative_prompt_is_the_pipelines(pipeline) -> None:
    settings = SamplerSettings(2, 5.0, 64, 64)
    image = ours(pipeline, settings, 0, "a cat")
    assert same(image, theirs(pipeline, settings, 0, "a cat"))
    assert not same(image, ours(pipeline, settings, 0))


def test_seed_guidance_and_steps_each_change_the_image(pipeline) -> None:
    settings = [SamplerSettings(2, 5.0, 64, 64), SamplerSettings(2, 1.0, 64, 64), SamplerSettings(3, 5.0, 64, 64)]
    images = [*(ours(pipeline, one, 0) for one in settings), ours(pipeline, settings[0], 1)]
    assert not any(same(image, other) for number, image in enumerate(images) for other in images[:number])


@pytest.mark.parametrize("guidance", [1.0, 0.5, 0.0])
def test_guidance_of_one_or_less_does_not_look_at_the_negative_prompt(pipeline, guidance: float) -> None:
    prompt = conditioning(pipeline, "a dog")
    poison = Conditioning(prompt.prompt_embeds * torch.nan, prompt.pooled_prompt_embeds * torch.nan)
    settings = SamplerSettings(2, guidance, 64, 64)
    latents = sample_latents(pipeline.transformer, pipeline.scheduler, prompt, poison, settings, [0])
    assert same(to_image(pipeline.vae, latents), theirs(pipeline, SamplerSettings(2, 1.0, 64, 64), 0))


def test_a_scheduler_whose_shift_depends_on_the_size_is_asked_as_the_pipeline_asks(pipeline) -> None:
    """SD3's own does not, but a folder may bring such a one."""
    other = copy.copy(pipeline)
    other.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    settings = SamplerSettings(3, 5.0, height=64, width=96)
    image = ours(other, settings, 0)
    assert same(image, theirs(other, settings, 0))
    assert not same(image, ours(pipeline, settings, 0))


def test_images_drawn_together_are_those_drawn_alone_but_for_rounding(pipeline) -> None:
    """Each by its own prompt and seed, whatever stands beside it."""
    settings, seeds = SamplerSettings(3, 5.0, 64, 48), [4, 5, 6]
    prompts = [conditioning(pipeline, prompt) for prompt in ("a dog", "a red house", "")]
    negative = conditioning(pipeline, "a cat")
    together = Conditioning(
        torch.cat([prompt.prompt_embeds for prompt in prompts]),
        torch.cat([prompt.pooled_prompt_embeds for prompt in prompts]),
    )

    def drawn(prompt: Conditioning, seeds: list[int]) -> torch.Tensor:
        return sample_latents(pipeline.transformer, pipeline.scheduler, prompt, negative, settings, seeds)

    alone = [drawn(prompt, [seed]) for prompt, seed in zip(prompts, seeds, strict=True)]
    torch.testing.assert_close(drawn(together, seeds), torch.cat(alone), rtol=0, atol=1e-4)


def test_neither_the_scheduler_nor_the_global_random_state_is_touched(pipeline) -> None:
    settings, state = SamplerSettings(2, 5.0, 64, 64), torch.random.get_rng_state()
    pipeline.scheduler.set_timesteps(7)
    ours(pipeline, settings, 0)
    assert len(pipeline.scheduler.timesteps) == 7
    assert torch.equal(torch.random.get_rng_state(), state)


def test_latents_have_the_models_dtype_and_every_step_is_reported(pipeline) -> None:
    prompt, steps = conditioning(pipeline, "a dog"), []
    transformer = copy.deepcopy(pipeline.transformer).to(torch.bfloat16)
    latents = sample_latents(
        transformer,
        pipeline.scheduler,
        prompt,
        prompt,
        SamplerSettings(3, 5.0, 48, 64),
        [0],
        on_step=lambda: steps.append(1),
    )
    assert latents.shape == (1, 16, 6, 8)
    assert latents.dtype is torch.bfloat16
    assert len(steps) == 3


def test_a_picture_that_is_not_finite_is_black_and_told_from_others(pipeline) -> None:
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert fault_of(to_image(pipeline.vae, latents)) is None
    for value in (torch.nan, torch.inf):
        image = to_image(pipeline.vae, torch.full_like(latents, value))
        assert image.getextrema() == ((0, 0),) * 3
        assert str(fault_of(image)).startswith("black, as the model computed NaN or infinity")
    grey = Image.new("RGB", (8, 8), (90, 90, 90))
    assert str(fault_of(grey)).startswith("one colour throughout")
    grey.putpixel((3, 3), (90, 91, 90))
    assert fault_of(grey) is None

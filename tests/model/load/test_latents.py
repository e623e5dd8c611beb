"""Latents: the moments are the VAE's own, and the formulas are those of the pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_vae
from sd3tune.model.load.latents import decode, encode_moments, sample_latents

SCALING, SHIFT = 1.5305, 0.0609


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return load_vae(resolve_base("tiny"), torch.float32)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Structure at several scales, wider than it is high."""
    y, x = np.mgrid[0:64, 0:96]
    channels = [np.sin(x / 7) * np.cos(y / 5), np.sin((x + y) / 3), ((x // 8 + y // 8) % 2) * 1.0]
    return Image.fromarray(((np.stack(channels, -1) * 0.5 + 0.5) * 255).astype(np.uint8))


def test_moments_equal_the_vae_s_on_the_pipeline_s_preprocessing(vae: AutoencoderKL, image: Image.Image) -> None:
    pixels = VaeImageProcessor(vae_scale_factor=8).preprocess(image)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    mean, std = encode_moments(vae, pixels)
    assert mean.shape == std.shape == (1, 16, 8, 12)
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(std, posterior.std)
    assert not mean.requires_grad


def test_moments_are_fp32_and_close_when_the_vae_is_bf16(vae: AutoencoderKL, image: Image.Image) -> None:
    pixels = VaeImageProcessor(vae_scale_factor=8).preprocess(image)
    mean, std = encode_moments(load_vae(resolve_base("tiny"), torch.bfloat16), pixels)
    assert (mean.dtype, std.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(mean, encode_moments(vae, pixels)[0], atol=0.1, rtol=0.1)


def test_a_draw_equals_the_posterior_s_own_sample(vae: AutoencoderKL, image: Image.Image) -> None:
    pixels = VaeImageProcessor(vae_scale_factor=8).preprocess(image)
    with torch.no_grad():
        sample = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(7))
    eps = torch.randn(sample.shape, generator=torch.Generator().manual_seed(7))
    latents = sample_latents(*encode_moments(vae, pixels), eps, SCALING, SHIFT)
    assert torch.equal(latents, (sample - SHIFT) * SCALING)


def test_the_formula_in_float64() -> None:
    source = torch.Generator().manual_seed(0)
    mean, std, eps = (torch.rand(2, 16, 4, 4, dtype=torch.float64, generator=source) for _ in range(3))
    expected = 1.5305 * (mean.numpy() + std.numpy() * eps.numpy()) - 1.5305 * 0.0609
    np.testing.assert_allclose(sample_latents(mean, std, eps, SCALING, SHIFT).numpy(), expected, rtol=1e-14, atol=1e-14)


def test_decode_undoes_the_scale_and_the_shift(vae: AutoencoderKL) -> None:
    raw = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(raw).sample
    pixels = decode(vae, sample_latents(raw, torch.zeros_like(raw), torch.zeros_like(raw), SCALING, SHIFT))
    assert pixels.shape == (1, 3, 32, 48)
    torch.testing.assert_close(pixels, expected, atol=1e-4, rtol=1e-4)
    without_shift = sample_latents(raw, torch.zeros_like(raw), torch.zeros_like(raw), SCALING, 0.0)
    assert (decode(vae, without_shift) - expected).abs().max() > 1e-2


def test_decode_is_what_the_pipeline_does_with_its_latents() -> None:
    base = resolve_base("tiny")
    pipeline = StableDiffusion3Pipeline.from_pretrained(base.path)
    pipeline.set_progress_bar_config(disable=True)
    images = {
        kind: pipeline(
            "a dog",
            height=64,
            width=64,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type=kind,
        ).images
        for kind in ("latent", "pt")
    }
    pixels = decode(load_vae(base, torch.float32), images["latent"])
    assert torch.equal((pixels / 2 + 0.5).clamp(0, 1), images["pt"])

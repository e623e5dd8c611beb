"""Noise to image, as `StableDiffusion3Pipeline` does it number for number, but over one component at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from PIL import Image
from torch import Tensor

from sd3tune.model.latents import decode
from sd3tune.sampling.samplers import SAMPLERS


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of n prompts: `prompt_embeds` [n, tokens, width] and `pooled_prompt_embeds` [n, width]."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor


@dataclass(frozen=True)
class SamplerSettings:
    """How an image is drawn. `guidance` 1 or less means no classifier-free guidance (Ho & Salimans 2022)."""

    steps: int = 28
    guidance: float = 7.0
    height: int = 1024
    width: int = 1024
    sampler: str = "euler"
    """A key of `samplers.SAMPLERS`."""
    shift: float | None = None
    """Instead of the base's own: sigma becomes shift * sigma / (1 + (shift - 1) * sigma)."""

    @property
    def evaluations(self) -> int:
        """How often the transformer is asked for a velocity (of both prompts, with guidance)."""
        return SAMPLERS[self.sampler].evaluations(self.steps)


@torch.no_grad()
def sample_latents(
    transformer: SD3Transformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    positive: Conditioning,
    negative: Conditioning,
    settings: SamplerSettings,
    seeds: Sequence[int],
    latent_side: int = 8,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Latents [n, C, height / 8, width / 8] of n images, in the transformer's dtype, on its device.

    There are n prompts and seeds, and as many negative prompts or one for all. An image's noise comes from a CPU
    generator with its seed, so it is the same on every device and beside any neighbours; with neighbours, though, the
    last bits of a picture differ from those of one drawn alone. `scheduler` is the base's; `on_step` is called after
    each of `settings.evaluations`.
    """
    device, dtype = transformer.device, transformer.dtype
    shape = (transformer.config.in_channels, settings.height // latent_side, settings.width // latent_side)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds]
    latents = torch.stack(noise).to(device)
    guided = settings.guidance > 1
    embeds, pooled = positive.prompt_embeds, positive.pooled_prompt_embeds
    if guided:
        embeds = torch.cat([negative.prompt_embeds.expand_as(embeds), embeds])
        pooled = torch.cat([negative.pooled_prompt_embeds.expand_as(pooled), pooled])
    embeds, pooled = embeds.to(device, dtype), pooled.to(device, dtype)

    solver = SAMPLERS[settings.sampler].scheduler(scheduler, settings.shift)
    solver.set_timesteps(settings.steps, device=device, **_dynamic_shift(solver, transformer, latents))
    for timestep in solver.timesteps:
        doubled = torch.cat([latents, latents]) if guided else latents
        velocity = transformer(
            hidden_states=doubled,
            timestep=timestep.expand(len(doubled)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        if guided:
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + settings.guidance * (conditional - unconditional)
        latents = solver.step(velocity, timestep, latents, return_dict=False)[0].to(dtype)
        on_step()
    return latents


def to_image(vae: AutoencoderKL, latents: Tensor) -> Image.Image:
    """Decode latents [1, C, h, w] into a picture, rounding as diffusers' image processor does."""
    pixels = (decode(vae, latents)[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0)
    return Image.fromarray((pixels.cpu().numpy() * 255).round().astype("uint8"))


def _dynamic_shift(solver: Any, transformer: SD3Transformer2DModel, latents: Tensor) -> dict[str, float]:
    """`mu` for a scheduler whose shift depends on the resolution; empty for SD3's own."""
    settings = solver.config
    if not settings.get("use_dynamic_shifting"):
        return {}
    tokens = latents.shape[-1] * latents.shape[-2] // transformer.config.patch_size**2
    low, high = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
    base, top = settings.get("base_shift", 0.5), settings.get("max_shift", 1.16)
    return {"mu": base + (top - base) * (tokens - low) / (high - low)}

"""Images to latents and back: `z0 = (x - shift_factor) * scaling_factor`, x sampled from the posterior."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the VAE's posterior, fp32 [B, 16, H/8, W/8] on the CPU, not normalised.

    `pixels` is [B, 3, H, W] in [-1, 1]. One image per call is bit-equal to `vae.encode` of that image. The moments are
    stored, and latents are sampled from them in training; a stored sample would repeat the same noise.
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return posterior.mean.float().cpu(), posterior.std.float().cpu()


def sample_latents(mean: Tensor, std: Tensor, eps: Tensor, scaling_factor: float, shift_factor: float) -> Tensor:
    """Return normalised latents z0 = (mean + std * eps - shift_factor) * scaling_factor; eps is standard normal."""
    return (mean + std * eps - shift_factor) * scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode normalised latents to pixels [B, 3, H, W], fp32 on the VAE's device, about [-1, 1], not clipped."""
    latents = latents.to(vae.device) / vae.config.scaling_factor + vae.config.shift_factor
    pixels: Tensor = vae.decode(latents.to(vae.dtype)).sample.float()
    return pixels

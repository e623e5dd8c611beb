"""Sampling, bit-equal to `StableDiffusion3Pipeline`, but with one component in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from PIL import Image
from torch import Tensor

from sd3tune.flow.objective import offset_noise
from sd3tune.model.compute.hoist import Modulation, compute_ahead, hoisted, modulate
from sd3tune.model.load.latents import decode
from sd3tune.model.load.latents import sample_latents as from_posterior
from sd3tune.sampling.samplers import SAMPLERS

LAST_SEED = 2**63 - 1
_NOT_FINITE = "not finite"
"""Key in `Image.info` that marks a picture with NaN or infinity; it is never written to a file."""


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of n prompts: `prompt_embeds` [n, tokens, width] and `pooled_prompt_embeds` [n, width]."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor


@dataclass(frozen=True)
class SkipLayers:
    """Skip-layer guidance: steer away from the velocity that the transformer predicts without some blocks.

    It is active from `start` to `stop`, as shares of all steps, and only with classifier-free guidance.
    """

    scale: float
    layers: tuple[int, ...]
    """Indices of the skipped blocks."""
    start: float
    stop: float


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of the sampler. `guidance` of 1 or less turns classifier-free guidance (Ho & Salimans 2022) off."""

    steps: int = 28
    guidance: float = 7.0
    height: int = 1024
    width: int = 1024
    sampler: str = "euler"
    """A key of `samplers.SAMPLERS`."""
    shift: float | None = None
    """Shift of the noise schedule, sigma -> shift * sigma / (1 + (shift - 1) * sigma). None: the base's own."""
    strength: float | None = None
    """With a start image, the share of the steps to run. None starts from noise."""
    skip_layers: SkipLayers | None = None
    noise_offset: float = 0.0
    """Strength of the constant offset that each image and channel gets in the starting noise; see `add_offset`."""

    @property
    def first_step(self) -> int:
        """Index of the first step to run, rounded as in `StableDiffusion3Img2ImgPipeline`."""
        return 0 if self.strength is None else int(self.steps - min(self.steps * self.strength, self.steps))

    @property
    def evaluations(self) -> int:
        """Number of transformer evaluations; with guidance, each evaluates both prompts in one batch."""
        return SAMPLERS[self.sampler].evaluations(self.steps - self.first_step)


@dataclass(frozen=True)
class Start:
    """Start images as VAE posteriors: mean and std, [n or 1, C, h, w] fp32, not normalised."""

    mean: Tensor
    std: Tensor
    scaling_factor: float
    shift_factor: float
    mask: Tensor | None = None
    """[n, 1, h, w] fp32: 1 where the image is redrawn, 0 where it is kept. None redraws all of it."""


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
    start: Start | None = None,
) -> Tensor:
    """Return latents [n, C, height / 8, width / 8] of n images, in the transformer's dtype, on its device.

    There are n prompts and seeds, and n negative prompts or one for all. The noise of an image comes from a CPU
    generator with its seed, so it is the same on every device and in every batch. The batch size still changes the last
    bits of an image. `scheduler` is the base's; `on_step` is called after each of `settings.evaluations`. `start` is
    used with `settings.strength`: its images are noised to the sigma of the first remaining step. Where its mask is 0,
    each step ends with the start images, noised to the step's last sigma.
    """
    device, dtype = transformer.device, transformer.dtype
    shape = (transformer.config.in_channels, settings.height // latent_side, settings.width // latent_side)
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    posterior_noise = (
        None if start is None else _normal(shape, sources, dtype)
    )  # drawn before the noise, as in the diffusers pipeline
    latents = add_offset(_normal(shape, sources, dtype), seeds, settings.noise_offset).to(device)
    velocity_of = _Guided(transformer, positive, negative, settings)

    solver = SAMPLERS[settings.sampler].scheduler(scheduler, settings.shift)
    solver.set_timesteps(settings.steps, device=device, **_dynamic_shift(solver, transformer, latents))
    begin, count = settings.first_step * SAMPLERS[settings.sampler].order, len(solver.timesteps)
    solver.set_begin_index(begin)  # or diffusers would look it up by value, for which the host waits
    noise, z0 = latents, None
    if start is not None and posterior_noise is not None:
        z0 = _normalised(start, posterior_noise).to(noise)
        latents = _noised(z0, noise, solver.sigmas[begin])
    mask = None if start is None or start.mask is None else start.mask.to(noise)
    with velocity_of.ahead(dict(enumerate(solver.timesteps[begin:], start=begin)), count):
        for number, timestep in enumerate(solver.timesteps[begin:], start=begin):
            velocity = velocity_of(latents, timestep, number, count)
            latents = solver.step(velocity, timestep, latents, return_dict=False)[0].to(dtype)
            if z0 is not None and mask is not None:
                latents = (1 - mask) * _noised(z0, noise, solver.sigmas[number + 1]) + mask * latents
            on_step()
    return latents


class _Guided:
    """The guided velocity: with classifier-free and skip-layer guidance."""

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        positive: Conditioning,
        negative: Conditioning,
        settings: SamplerSettings,
    ) -> None:
        self.transformer, self.settings, self.is_guided = transformer, settings, settings.guidance > 1
        device, dtype = transformer.device, transformer.dtype
        self.modulations: dict[int, Modulation] = {}
        self.skipped_modulations: dict[int, Modulation] = {}
        self.embeds = positive.prompt_embeds.to(device, dtype)
        self.pooled = positive.pooled_prompt_embeds.to(device, dtype)
        if self.is_guided:
            embeds, pooled = negative.prompt_embeds, negative.pooled_prompt_embeds
            self.both_embeds = torch.cat([embeds.to(device, dtype).expand_as(self.embeds), self.embeds])
            self.both_pooled = torch.cat([pooled.to(device, dtype).expand_as(self.pooled), self.pooled])

    @contextlib.contextmanager
    def ahead(self, timesteps: Mapping[int, Tensor], count: int) -> Iterator[None]:
        """Compute the hoisted layers' outputs for all timesteps at once, and use them inside the context.

        `timesteps` are those of the evaluations that will run, by number; `count` is the number with all others.
        """
        if not hoisted(self.transformer):
            yield
            return
        pooled = self.both_pooled if self.is_guided else self.pooled
        skipping = [number for number in timesteps if self._skips_layers(number, count)]
        made = compute_ahead(
            self.transformer,
            [
                *((timestep.expand(len(pooled)), pooled) for timestep in timesteps.values()),
                *((timesteps[number].expand(len(self.pooled)), self.pooled) for number in skipping),
            ],
        )
        self.modulations = dict(zip(timesteps, made, strict=False))
        self.skipped_modulations = dict(zip(skipping, made[len(timesteps) :], strict=True))
        try:
            yield
        finally:
            self.modulations, self.skipped_modulations = {}, {}
            modulate(self.transformer, None)

    def _skips_layers(self, number: int, count: int) -> bool:
        """Return whether evaluation `number` of `count` has skip-layer guidance."""
        skip = self.settings.skip_layers
        return skip is not None and self.is_guided and count * skip.start < number < count * skip.stop

    def __call__(self, latents: Tensor, timestep: Tensor, number: int, count: int) -> Tensor:
        """Return the guided velocity of evaluation `number` (0-based) of `count`."""
        if self.modulations:
            modulate(self.transformer, self.modulations[number])
        if not self.is_guided:
            return self._velocity(latents, timestep, self.embeds, self.pooled)
        doubled = self._velocity(torch.cat([latents, latents]), timestep, self.both_embeds, self.both_pooled)
        unconditional, conditional = doubled.chunk(2)
        velocity = unconditional + self.settings.guidance * (conditional - unconditional)
        skip = self.settings.skip_layers
        if skip is None or not self._skips_layers(number, count):
            return velocity
        if self.modulations:
            modulate(self.transformer, self.skipped_modulations[number])
        skipped = self._velocity(latents, timestep, self.embeds, self.pooled, skip_layers=list(skip.layers))
        return velocity + (conditional - skipped) * skip.scale

    def _velocity(self, latents: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor, **options: Any) -> Tensor:
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
            **options,
        )[0]
        return velocity


def _normal(shape: tuple[int, ...], generators: Sequence[torch.Generator], dtype: torch.dtype) -> Tensor:
    return torch.stack([torch.randn(shape, generator=generator, dtype=dtype) for generator in generators])


def add_offset(noise: Tensor, seeds: Sequence[int], strength: float) -> Tensor:
    """Add the noise offset of a model that was trained with `flow.noise_offset`: [n, C, h, w] in the dtype of `noise`.

    Each image and channel gets one more standard normal number, times `strength`. It comes from a separate CPU
    generator with the seed `LAST_SEED - seed`, so it depends on the image's seed alone.
    """
    if not strength:
        return noise
    sources = [torch.Generator().manual_seed(LAST_SEED - seed) for seed in seeds]
    offsets = torch.stack([torch.randn(noise.shape[1], generator=source) for source in sources])
    return offset_noise(noise.float(), offsets, strength).to(noise.dtype)


def _normalised(start: Start, posterior_noise: Tensor) -> Tensor:
    """Return z0 = mean + std * `posterior_noise`, normalised."""
    eps = posterior_noise.to(start.mean)
    return from_posterior(start.mean, start.std, eps, start.scaling_factor, start.shift_factor)


def _noised(z0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return sigma * noise + (1 - sigma) * z0."""
    sigma = sigma.to(noise)
    return sigma * noise + (1.0 - sigma) * z0


def to_image(vae: AutoencoderKL, latents: Tensor) -> Image.Image:
    """Decode latents [1, C, h, w] into a picture, rounding as diffusers' image processor does.

    An image with NaN or infinity becomes black, and `fault_of` reports it.
    """
    decoded = decode(vae, latents)[0]
    pixels = (decoded * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0)
    finite = not (~decoded.isfinite()).any()
    displayed = pixels if finite else torch.zeros_like(pixels)
    image = Image.fromarray((displayed.cpu().numpy() * 255).round().astype("uint8"))
    if not finite:
        image.info[_NOT_FINITE] = True
    return image


def fault_of(image: Image.Image) -> str | None:
    """Return the fault of a picture of `to_image` that is black or of one colour; None for any other picture."""
    if image.info.get(_NOT_FINITE):
        return "black, as the model computed NaN or infinity; an adapter or its weight may be too large"
    if image.getcolors(1) is not None:
        return "one colour throughout; an adapter or its weight may be too large, or the training has diverged"
    return None


def _dynamic_shift(solver: Any, transformer: SD3Transformer2DModel, latents: Tensor) -> dict[str, float]:
    """Return `mu` for a scheduler whose shift depends on the resolution; an empty mapping for SD3's scheduler."""
    settings = solver.config
    if not settings.get("use_dynamic_shifting"):
        return {}
    tokens = latents.shape[-1] * latents.shape[-2] // transformer.config.patch_size**2
    low, high = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
    base, top = settings.get("base_shift", 0.5), settings.get("max_shift", 1.16)
    return {"mu": base + (top - base) * (tokens - low) / (high - low)}

"""Sampling within a run, from the store's embeddings: conditioning, the VAE decoder, prompts, and class images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image

from sd3tune.config.sections.outputs import PreviewPrompt
from sd3tune.data.store import Store
from sd3tune.encode.resources import release
from sd3tune.files.atomic import new_file, remove_stale
from sd3tune.model.load.components import load_scheduler, load_vae, vae_dtype
from sd3tune.model.load.text import on_device
from sd3tune.reporting import progress_bar, say
from sd3tune.run.preflight import Plan
from sd3tune.run.setup import load_base
from sd3tune.runtime.processes import Processes
from sd3tune.sampling.sampler import Conditioning, SamplerSettings, SkipLayers, fault_of, sample_latents, to_image

NEGATIVE_PROMPT = ""
"""The unconditional prompt, and a dropped caption: the empty string's encoding, never zeros."""


@dataclass(frozen=True)
class Wanted:
    """A picture to draw within a run."""

    prompt: str
    seed: int
    negative: str = NEGATIVE_PROMPT
    sides: tuple[int, int] | None = None
    """(width, height) in pixels; None for the size of the training."""
    skip_layers: SkipLayers | None = None


def wanted_preview(settings: PreviewPrompt, seed: int) -> Wanted:
    """Return the picture of a preview prompt."""
    skip = None
    if settings.slg is not None:
        skip = SkipLayers(settings.slg, tuple(settings.slg_layers), settings.slg_start, settings.slg_stop)
    return Wanted(settings.prompt, seed, settings.negative, settings.sides, skip)


def stored_conditioning(
    plan: Plan,
    store: Store,
    captions: Mapping[str, Mapping[str, str]],
    prompt: str,
    transformer: SD3Transformer2DModel,
) -> Conditioning:
    """Return a prompt's conditioning from the store's embeddings; `captions` is encoder -> text -> key."""
    embeddings = {
        encoder: on_device({name: tensor[None] for name, tensor in store.get(keys[prompt]).items()}, plan.device)
        for encoder, keys in captions.items()
    }
    return Conditioning(*plan.method.conditioning(embeddings, transformer))


def load_decoder(plan: Plan) -> AutoencoderKL:
    """Load the VAE onto the device in the run's dtype, or in fp32 instead of fp16, in which it overflows."""
    return load_vae(plan.base, vae_dtype(plan.dtype), plan.device)


def draw_prompts(
    plan: Plan,
    store: Store,
    captions: Mapping[str, Mapping[str, str]],
    transformer: SD3Transformer2DModel,
    wanted: Sequence[Wanted],
    *,
    base: bool,
    label: str,
) -> list[Image.Image]:
    """Return an image for each of `wanted`, with steps and guidance of previews.

    Denoises all of them with the transformer's present weights, then loads the VAE, decodes, and frees it. `base` is
    True for the base's weights, whose shift and noise offset may differ. `label` names the progress bar.
    """
    side, settings = plan.config.data.side, plan.config.preview
    offset = plan.base.noise_offset if base else plan.config.flow.noise_offset
    scheduler = load_scheduler(plan.base, None if base else plan.method.sampling_shift())
    with progress_bar(total=settings.steps * len(wanted), desc=label, unit="step", leave=False, delay=2) as bar:
        latents = []
        for one in wanted:
            width, height = one.sides or (side, side)
            sampler = SamplerSettings(
                settings.steps, settings.guidance, height, width, skip_layers=one.skip_layers, noise_offset=offset
            )
            positive, negative = (
                stored_conditioning(plan, store, captions, text, transformer) for text in (one.prompt, one.negative)
            )
            latents.append(
                sample_latents(transformer, scheduler, positive, negative, sampler, [one.seed], on_step=bar.update)
            )
    vae = load_decoder(plan)
    images = [to_image(vae, latent) for latent in latents]
    del vae
    release(plan.device)
    return images


def draw_class_images(
    plan: Plan, store: Store, captions: Mapping[str, Mapping[str, str]], processes: Processes
) -> None:
    """Draw the missing class images with the base. The processes divide the images.

    Each image is saved when it is drawn, so a later attempt keeps it. Raises RunError if a folder is not writable.
    """
    wanted = {drawn.path: (prior.settings, drawn) for prior in plan.priors for drawn in prior.drawn}
    mine = [of for path, of in list(wanted.items())[processes.rank :: processes.world] if not path.exists()]
    if not mine:
        return
    for folder in {drawn.path.parent for _, drawn in mine}:
        remove_stale(folder)
    transformer = load_base(plan)
    vae, scheduler = load_decoder(plan), load_scheduler(plan.base)
    negative = stored_conditioning(plan, store, captions, NEGATIVE_PROMPT, transformer)
    bar = progress_bar(mine, desc="drawing class images", unit="image", disable=not processes.is_main)
    for settings, drawn in bar:
        positive = stored_conditioning(plan, store, captions, drawn.prompt, transformer)
        sampler = SamplerSettings(settings.steps, settings.guidance, *drawn.size, noise_offset=plan.base.noise_offset)
        image = to_image(vae, sample_latents(transformer, scheduler, positive, negative, sampler, [drawn.seed]))
        with new_file(drawn.path) as temporary:
            image.save(temporary, format="PNG")
        if fault := fault_of(image):
            say(f"warning: {drawn.path}: {fault}")
    del transformer, vae
    release(plan.device)

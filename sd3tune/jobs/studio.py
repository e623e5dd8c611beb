"""Draws shots from one base: texts first, each once; then the transformer, with its adapters; then the VAE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image
from tqdm import tqdm

from sd3tune.encode.resources import release
from sd3tune.jobs.conditions import Conditions
from sd3tune.jobs.prompts import encode_prompts
from sd3tune.jobs.shots import Shot, Texts, batched, texts_of
from sd3tune.jobs.start_images import fitted
from sd3tune.model.adapter_io import Adapter, attach
from sd3tune.model.components import load_scheduler, load_transformer, load_vae
from sd3tune.model.latents import encode_moments
from sd3tune.sampling.sampler import Conditioning, Start, sample_latents, to_image

Images = dict[tuple[Path, tuple[int, int]], Start]
"""(file, size) -> the picture, cut to that size."""


@dataclass(frozen=True)
class Studio:
    """What all shots of a call have in common."""

    conditions: Conditions
    adapters: Sequence[Adapter]
    """The `loras` of a shot are numbers in this."""
    dtype: torch.dtype
    device: torch.device
    batch: int = 1
    """Pictures that are denoised at once; with neighbours, the last bits of a picture differ."""


def draw(studio: Studio, shots: Sequence[Shot]) -> Iterator[tuple[Shot, Image.Image]]:
    """Each shot with its picture as soon as it is there; their order is that of `batched`.

    One text encoder at a time is in memory, then the transformer. The VAE comes beside it when the first picture is
    to be decoded; before the last one, and so before the only one, the transformer leaves.
    """
    texts = _encoded(studio, shots)
    images = _encoded_images(studio, shots)
    transformer: SD3Transformer2DModel | None = _transformer(studio, shots)
    scheduler, vae = load_scheduler(studio.conditions.base), None
    batches, done = batched(shots, studio.batch), 0
    with tqdm(total=sum(shot.sampler_settings.evaluations for shot in shots), desc="drawing", unit="step") as bar:
        for number, together in enumerate(batches, start=1):
            _use_adapters(transformer, together[0])
            latents = sample_latents(
                transformer,
                scheduler,
                _joined([texts[shot.texts] for shot in together]),
                _joined([texts[Texts(shot.negative)] for shot in together]),
                together[0].sampler_settings,
                [shot.seed for shot in together],
                on_step=partial(bar.update, len(together)),
                start=_starts(together, images),
            )
            if number == len(batches):
                transformer = None
                release(studio.device)
            if vae is None:
                vae = _vae(studio)
            for shot, one in zip(together, latents, strict=True):
                yield shot, to_image(vae, one[None])
            done += len(together)
            bar.set_postfix_str(f"picture {done} of {len(shots)}")


def _encoded(studio: Studio, shots: Sequence[Shot]) -> dict[Texts, Conditioning]:
    wanted, conditions = texts_of(shots), studio.conditions
    length = conditions.t5_length
    found = encode_prompts(conditions.base, conditions.encoders, wanted, length, studio.dtype, studio.device)
    return dict(zip(wanted, found, strict=True))


def _encoded_images(studio: Studio, shots: Sequence[Shot]) -> Images:
    """The pictures that shots start from, through the VAE, which leaves again."""
    wanted = dict.fromkeys((shot.image, shot.size) for shot in shots)
    images: Images = {}
    vae = None
    for path, size in wanted:
        if path is None or size is None:
            continue
        vae = vae or _vae(studio)
        mean, std = encode_moments(vae, fitted(path, size))
        images[path, size] = Start(mean, std, vae.config.scaling_factor, vae.config.shift_factor)
    del vae
    release(studio.device)
    return images


def _starts(together: Sequence[Shot], images: Images) -> Start | None:
    found = [images[shot.image, shot.size] for shot in together if shot.image is not None and shot.size is not None]
    if not found:
        return None
    means, stds = torch.cat([one.mean for one in found]), torch.cat([one.std for one in found])
    return replace(found[0], mean=means, std=stds)


def _vae(studio: Studio) -> AutoencoderKL:
    """In fp32 instead of fp16, in which it makes black images."""
    dtype = torch.float32 if studio.dtype is torch.float16 else studio.dtype
    return load_vae(studio.conditions.base, dtype, studio.device)


def _joined(several: Sequence[Conditioning]) -> Conditioning:
    return Conditioning(
        torch.cat([one.prompt_embeds for one in several]), torch.cat([one.pooled_prompt_embeds for one in several])
    )


def _transformer(studio: Studio, shots: Sequence[Shot]) -> SD3Transformer2DModel:
    """With every adapter in it, and none in use."""
    transformer = load_transformer(studio.conditions.base, studio.dtype, studio.device)
    for number, adapter in enumerate(studio.adapters):
        counted = attach(transformer, adapter, _adapter_name(number))
        weights = dict.fromkeys(weight for shot in shots for index, weight in shot.loras if index == number)
        said = ", ".join(f"{weight:g}" for weight in weights)
        print(f"{adapter.label}: {counted.matched} tensors loaded, weight {said}")
        if counted.unmatched:
            some = ", ".join(counted.unmatched[:3])
            print(f"warning: {len(counted.unmatched)} of its modules are not in this base: {some}")
    return transformer


def _use_adapters(transformer: SD3Transformer2DModel, shot: Shot) -> None:
    if not getattr(transformer, "peft_config", None):
        return
    if not shot.loras:
        transformer.disable_adapters()
        return
    transformer.enable_adapters()
    transformer.set_adapters([_adapter_name(number) for number, _ in shot.loras], [weight for _, weight in shot.loras])


def _adapter_name(number: int) -> str:
    return f"adapter_{number}"

"""Draws shots from one base: texts first, each once; then the transformer, with its adapters; then the VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image
from torch import nn

from sd3tune.adapter.file import Adapter, attach
from sd3tune.encode.resources import release
from sd3tune.inference.conditions import Conditions
from sd3tune.inference.image_request import Shot, Texts, batched, texts_of
from sd3tune.inference.prompts import encode_prompts
from sd3tune.inference.request import IN_FULL, Memory
from sd3tune.inference.start_images import fitted
from sd3tune.model.base.parts import is_modulation
from sd3tune.model.compute.hoist import hoist
from sd3tune.model.load.components import load_scheduler, load_vae
from sd3tune.model.load.latents import encode_moments
from sd3tune.model.load.quantized import load_transformer_in
from sd3tune.reporting import progress_bar, say
from sd3tune.runtime.out_of_memory import explain_oom
from sd3tune.sampling.sampler import Conditioning, Start, sample_latents, to_image

Result = TypeVar("Result")
_SMALLER_T5 = "hold T5 in 8 bits with --t5-8bit, or do without it with --no-t5"
_SMALLER_TRANSFORMER = "hold the transformer in 4 bits with --quantize nf4, or draw with a smaller --size or --batch"
_SMALLER_VAE = "decode in tiles with --vae-tiling, or send the transformer away meanwhile with --offload"
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
    memory: Memory = IN_FULL

    @property
    def rest(self) -> torch.device:
        """Where the transformer and the VAE wait."""
        return torch.device("cpu") if self.memory.offload else self.device


def draw(studio: Studio, shots: Sequence[Shot], one_by_one: bool = True) -> Iterator[tuple[Shot, Image.Image]]:
    """Each shot with its picture, in the order of `batched`.

    One text encoder at a time is in memory, then the transformer, then the VAE. `one_by_one` gives a picture as soon as
    it is drawn; for that, the VAE comes beside the transformer, which leaves before the last one is decoded.
    """
    texts, images = _encoded(studio, shots), _encoded_images(studio, shots)
    transformer = Part(lambda: _transformer(studio, shots), studio, "drawing", _SMALLER_TRANSFORMER)
    vae = Part(lambda: _vae(studio), studio, "decoding", _SMALLER_VAE)
    scheduler = load_scheduler(studio.conditions.base)
    batches, done = batched(shots, studio.batch), 0
    with progress_bar(
        total=sum(shot.sampler_settings.evaluations for shot in shots), desc="drawing", unit="step"
    ) as bar:

        def denoised(model: SD3Transformer2DModel, together: Sequence[Shot], warm_up: bool = False) -> torch.Tensor:
            _use_adapters(model, together[0])
            settings = together[0].sampler_settings
            return sample_latents(
                model,
                scheduler,
                _joined([texts[shot.texts] for shot in together]),
                _joined([texts[Texts(shot.negative)] for shot in together]),
                replace(settings, steps=1, strength=None) if warm_up else settings,
                [shot.seed for shot in together],
                on_step=(lambda: None) if warm_up else partial(bar.update, len(together)),
                start=None if warm_up else _starts(together, images),
            )

        if studio.memory.compiled:
            bar.set_postfix_str("compiling, which can take minutes")
            transformer.at_work(partial(denoised, warm_up=True), batches[0])
            bar.unpause()
        waiting: list[tuple[list[Shot], torch.Tensor]] = []
        for number, together in enumerate(batches, start=1):
            waiting.append((together, transformer.at_work(denoised, together)))
            done += len(together)
            bar.set_postfix_str(f"picture {done} of {len(shots)}")
            is_last = number == len(batches)
            if is_last:
                transformer.leave()
            while waiting and (one_by_one or is_last):
                drawn, latents = waiting.pop(0)
                yield from zip(drawn, vae.at_work(_decoded, latents), strict=True)


def _decoded(vae: AutoencoderKL, latents: torch.Tensor) -> list[Image.Image]:
    return [to_image(vae, one[None]) for one in latents]


class Part:
    """The transformer or the VAE: loaded when it is first needed, and with `--offload` on the device while it works."""

    def __init__(self, load: Callable[[], nn.Module], studio: Studio, doing: str, way_out: str) -> None:
        self._load, self._studio, self._doing, self._way_out = load, studio, doing, way_out
        self._model: nn.Module | None = None

    def at_work(self, use: Callable[[Any, Any], Result], what: Any) -> Result:
        """`use` of the model and `what`; nothing else may hold the model, so that it can leave.

        Raises RunError, with the next option to try, when memory runs out.
        """
        with explain_oom(self._doing, lambda: self._way_out):
            if self._model is None:
                self._model = self._load()
            if not self._studio.memory.offload:
                return use(self._model, what)
            self._move(self._studio.device)
            result = use(self._model, what)
            self._move(self._studio.rest)
            return result

    def leave(self) -> None:
        """Give back its memory."""
        self._model = None
        release(self._studio.device)

    def _move(self, device: torch.device) -> None:
        if self._model is not None:
            self._model.to(device)
            release(self._studio.device)


def _encoded(studio: Studio, shots: Sequence[Shot]) -> dict[Texts, Conditioning]:
    wanted, conditions = texts_of(shots), studio.conditions
    length = conditions.t5_length
    eight_bit = ["t5"] if studio.memory.t5_8bit else []
    with explain_oom("encoding the prompts", lambda: _SMALLER_T5):
        found = encode_prompts(
            conditions.base, conditions.encoders, wanted, length, studio.dtype, studio.device, eight_bit
        )
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
    vae = load_vae(studio.conditions.base, dtype, studio.device)
    if studio.memory.vae_tiling:
        vae.enable_tiling()
    return vae


def _joined(several: Sequence[Conditioning]) -> Conditioning:
    return Conditioning(
        torch.cat([one.prompt_embeds for one in several]), torch.cat([one.pooled_prompt_embeds for one in several])
    )


def _transformer(studio: Studio, shots: Sequence[Shot]) -> SD3Transformer2DModel:
    """With every adapter in it, and none in use."""
    form = studio.memory.quantize or "none"
    where = studio.rest if form == "none" else studio.device  # on which layers are rounded
    trained = [module for adapter in studio.adapters for module in adapter.factors]
    hoisted = form != "none" and not studio.memory.compiled and not any(map(is_modulation, trained))
    prepare = hoist if hoisted else None
    transformer = load_transformer_in(form, studio.conditions.base, studio.dtype, where, prepare)
    nn.Module.to(transformer, studio.rest)
    for number, adapter in enumerate(studio.adapters):
        counted = attach(transformer, adapter, _adapter_name(number))
        weights = dict.fromkeys(weight for shot in shots for index, weight in shot.loras if index == number)
        said = ", ".join(f"{weight:g}" for weight in weights)
        say(f"{adapter.label}: {counted.matched} tensors loaded, weight {said}")
        if counted.unmatched:
            some = ", ".join(counted.unmatched[:3])
            say(f"warning: {len(counted.unmatched)} of its modules are not in this base: {some}")
    if studio.memory.compiled:
        for block in transformer.transformer_blocks:
            block.compile()
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

"""Draw images from one base: encode each text once, denoise with transformer and adapters, decode with the VAE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image
from torch import nn

from sd3tune.adapter.attach import attach
from sd3tune.adapter.embedding import Embedding
from sd3tune.adapter.file import Adapter
from sd3tune.encode.resources import release
from sd3tune.inference.conditions import Conditions
from sd3tune.inference.image_request import ImageRequest, Texts
from sd3tune.inference.job import IN_FULL, Memory
from sd3tune.inference.prompts import Prompt, encode_prompts
from sd3tune.inference.start_images import fitted, fitted_mask, latent_mask, pasted
from sd3tune.model.base.parts import is_modulation
from sd3tune.model.compute.hoist import hoist
from sd3tune.model.load.components import load_scheduler, load_vae, vae_dtype
from sd3tune.model.load.latents import encode_moments
from sd3tune.model.load.quantized import load_transformer_in
from sd3tune.reporting import progress_bar, say
from sd3tune.runtime.out_of_memory import explain_oom
from sd3tune.sampling.sampler import (
    Conditioning,
    SamplerSettings,
    SkipLayers,
    Start,
    sample_latents,
    to_image,
)

Result = TypeVar("Result")
_SMALLER_T5 = "hold T5 in 8 bits with --t5-8bit, or do without it with --no-t5"
_SMALLER_TRANSFORMER = "hold the transformer in 4 bits with --quantize nf4, or draw with a smaller --size or --batch"
_SMALLER_VAE = "decode in tiles with --vae-tiling, or send the transformer away meanwhile with --offload"
Images = dict[tuple[Path, Path | None, tuple[int, int]], Start]
"""(file, mask or None, size) -> the encoded picture, cut to that size, with its mask."""


@dataclass(frozen=True)
class InferenceSession:
    """The model, adapters and settings that all images of a job share."""

    conditions: Conditions
    adapters: Sequence[Adapter]
    """The `loras` of a request index this sequence."""
    dtype: torch.dtype
    device: torch.device
    batch: int = 1
    """Images that are denoised at once. The batch size changes the last bits of an image."""
    memory: Memory = IN_FULL
    embeddings: Sequence[Embedding] = ()
    """Learned tokens of all prompts."""
    own: Mapping[int, Embedding] = field(default_factory=dict)
    """Learned tokens of pivotal tuning, by the index of their adapter; a request without it does not use them."""

    @property
    def idle_device(self) -> torch.device:
        """The device that holds the transformer and the VAE while they are idle."""
        return torch.device("cpu") if self.memory.offload else self.device


def draw(
    session: InferenceSession, requests: Sequence[ImageRequest], one_by_one: bool = True
) -> Iterator[tuple[ImageRequest, Image.Image]]:
    """Yield each request with its image, in the order of `batched`.

    One text encoder at a time is in memory, then the transformer, then the VAE. `one_by_one` yields an image as soon as
    it is drawn, so the VAE is then loaded next to the transformer. The transformer is freed before the last batch is
    decoded.
    """
    texts, images = _encode_texts(session, requests), _encode_images(session, requests)
    transformer = Component(lambda: _load_transformer(session, requests), session, "drawing", _SMALLER_TRANSFORMER)
    vae = Component(lambda: _load_vae(session), session, "decoding", _SMALLER_VAE)
    scheduler = load_scheduler(session.conditions.base)
    batches, done = batched(requests, session.batch), 0
    evaluations = sum(sampler_settings(request).evaluations for request in requests)
    with progress_bar(total=evaluations, desc="drawing", unit="step") as bar:

        def denoise(model: SD3Transformer2DModel, group: Sequence[ImageRequest], warm_up: bool = False) -> torch.Tensor:
            _use_adapters(model, group[0])
            settings = sampler_settings(group[0])
            return sample_latents(
                model,
                scheduler,
                _concatenate([texts[_prompt(session, request, request.texts)] for request in group]),
                _concatenate([texts[_prompt(session, request, Texts(request.negative))] for request in group]),
                replace(settings, steps=1, strength=None) if warm_up else settings,
                [request.seed for request in group],
                on_step=(lambda: None) if warm_up else partial(bar.update, len(group)),
                start=None if warm_up else _start_images(group, images),
            )

        if session.memory.compiled:
            bar.set_postfix_str("compiling, which can take minutes")
            transformer.run(partial(denoise, warm_up=True), batches[0])
            bar.unpause()
        waiting: list[tuple[list[ImageRequest], torch.Tensor]] = []
        for number, group in enumerate(batches, start=1):
            waiting.append((group, transformer.run(denoise, group)))
            done += len(group)
            bar.set_postfix_str(f"picture {done} of {len(requests)}")
            is_last = number == len(batches)
            if is_last:
                transformer.free()
            while waiting and (one_by_one or is_last):
                drawn, latents = waiting.pop(0)
                for request, image in zip(drawn, vae.run(_decode, latents), strict=True):
                    yield request, _with_kept_pixels(request, image)


def sampler_settings(request: ImageRequest) -> SamplerSettings:
    """Return the sampler's settings for a request whose size is known."""
    if request.size is None:
        raise ValueError("the size is not settled")
    width, height = request.size
    skip = None
    if request.slg is not None:
        skip = SkipLayers(request.slg, request.slg_layers, request.slg_start, request.slg_stop)
    return SamplerSettings(
        steps=request.steps,
        guidance=request.guidance,
        height=height,
        width=width,
        sampler=request.sampler,
        shift=request.shift,
        strength=None if request.image is None else request.strength,
        skip_layers=skip,
        noise_offset=request.noise_offset,
    )


def batched(requests: Iterable[ImageRequest], most: int) -> list[list[ImageRequest]]:
    """Group requests with equal adapters and settings, at most `most` in a group."""
    groups: dict[tuple[object, ...], list[ImageRequest]] = {}
    for request in requests:
        groups.setdefault((request.loras, request.mask is None, sampler_settings(request)), []).append(request)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def prompts_of(session: InferenceSession, requests: Sequence[ImageRequest]) -> list[Prompt]:
    """Return the distinct prompts and negative prompts."""
    both = [(request, texts) for request in requests for texts in (request.texts, Texts(request.negative))]
    return list(dict.fromkeys(_prompt(session, request, texts) for request, texts in both))


def _prompt(session: InferenceSession, request: ImageRequest, texts: Texts) -> Prompt:
    of_text = (lora for lora in request.loras if session.adapters[lora[0]].text_parts or lora[0] in session.own)
    return Prompt(texts, tuple(of_text))


def _with_kept_pixels(request: ImageRequest, image: Image.Image) -> Image.Image:
    """Return the image with the start image's own pixels outside the mask, which the VAE would change a little."""
    if request.mask is None or request.image is None:
        return image
    return pasted(image, request.image, fitted_mask(request.mask, image.size))


def _decode(vae: AutoencoderKL, latents: torch.Tensor) -> list[Image.Image]:
    return [to_image(vae, one[None]) for one in latents]


class Component:
    """The transformer or the VAE: loaded when it is first needed; with `--offload`, on the device only while in use."""

    def __init__(self, load: Callable[[], nn.Module], session: InferenceSession, activity: str, hint: str) -> None:
        self._load, self._session, self._activity, self._hint = load, session, activity, hint
        self._model: nn.Module | None = None

    def run(self, function: Callable[[Any, Any], Result], argument: Any) -> Result:
        """Return `function(model, argument)`; nothing else may hold the model, so that it can be freed.

        Raises RunError, with the next option to try, when memory runs out.
        """
        with explain_oom(self._activity, lambda: self._hint):
            if self._model is None:
                self._model = self._load()
            if not self._session.memory.offload:
                return function(self._model, argument)
            self._move(self._session.device)
            result = function(self._model, argument)
            self._move(self._session.idle_device)
            return result

    def free(self) -> None:
        """Free the memory of the model."""
        self._model = None
        release(self._session.device)

    def _move(self, device: torch.device) -> None:
        if self._model is not None:
            self._model.to(device)
            release(self._session.device)


def _encode_texts(session: InferenceSession, requests: Sequence[ImageRequest]) -> dict[Prompt, Conditioning]:
    prompts, conditions = prompts_of(session, requests), session.conditions
    length = conditions.t5_length
    eight_bit = ["t5"] if session.memory.t5_8bit else []
    with explain_oom("encoding the prompts", lambda: _SMALLER_T5):
        encoded = encode_prompts(
            conditions.base,
            conditions.encoders,
            prompts,
            length,
            session.dtype,
            session.device,
            eight_bit,
            session.adapters,
            session.embeddings,
            session.own,
        )
    return dict(zip(prompts, encoded, strict=True))


def _encode_images(session: InferenceSession, requests: Sequence[ImageRequest]) -> Images:
    """Encode the start images with the VAE, and free it."""
    sources = dict.fromkeys((request.image, request.mask, request.size) for request in requests)
    images: Images = {}
    vae = None
    for path, mask, size in sources:
        if path is None or size is None:
            continue
        vae = vae or _load_vae(session)
        mean, std = encode_moments(vae, fitted(path, size))
        redrawn = None if mask is None else latent_mask(fitted_mask(mask, size))
        images[path, mask, size] = Start(mean, std, vae.config.scaling_factor, vae.config.shift_factor, redrawn)
    del vae
    release(session.device)
    return images


def _start_images(together: Sequence[ImageRequest], images: Images) -> Start | None:
    starts = [
        images[request.image, request.mask, request.size]
        for request in together
        if request.image is not None and request.size is not None
    ]
    if not starts:
        return None
    means, stds = torch.cat([start.mean for start in starts]), torch.cat([start.std for start in starts])
    masks = [start.mask for start in starts if start.mask is not None]
    return replace(starts[0], mean=means, std=stds, mask=torch.cat(masks) if masks else None)


def _load_vae(session: InferenceSession) -> AutoencoderKL:
    """Load the VAE; in fp32 instead of fp16, where it decodes to black images."""
    dtype = vae_dtype(session.dtype)
    vae = load_vae(session.conditions.base, dtype, session.device)
    if session.memory.vae_tiling:
        vae.enable_tiling()
    return vae


def _concatenate(several: Sequence[Conditioning]) -> Conditioning:
    return Conditioning(
        torch.cat([one.prompt_embeds for one in several]), torch.cat([one.pooled_prompt_embeds for one in several])
    )


def _load_transformer(session: InferenceSession, requests: Sequence[ImageRequest]) -> SD3Transformer2DModel:
    """Load the transformer with every adapter attached that the requests use."""
    form = session.memory.quantize or "none"
    device = session.idle_device if form == "none" else session.device  # layers are quantized on the GPU
    trained = [module for adapter in session.adapters for module in adapter.sizes]
    hoisted = form != "none" and not session.memory.compiled and not any(map(is_modulation, trained))
    prepare = hoist if hoisted else None
    transformer = load_transformer_in(form, session.conditions.base, session.dtype, device, prepare)
    nn.Module.to(transformer, session.idle_device)
    for number, adapter in enumerate(session.adapters):
        weights = dict.fromkeys(weight for request in requests for index, weight in request.loras if index == number)
        if not weights:
            continue
        counted = attach(transformer, adapter, _adapter_name(number))
        weights_text = ", ".join(f"{weight:g}" for weight in weights)
        say(f"{adapter.label}: {counted.matched} tensors loaded, weight {weights_text}")
        if counted.unmatched:
            examples = ", ".join(counted.unmatched[:3])
            say(f"warning: {len(counted.unmatched)} of its modules are not in this base: {examples}")
    if session.memory.compiled:
        for block in transformer.transformer_blocks:
            block.compile()
    return transformer


def _use_adapters(transformer: SD3Transformer2DModel, request: ImageRequest) -> None:
    if not getattr(transformer, "peft_config", None):
        return
    if not request.loras:
        transformer.disable_adapters()
        return
    transformer.enable_adapters()
    names, weights = [_adapter_name(number) for number, _ in request.loras], [weight for _, weight in request.loras]
    transformer.set_adapters(names, weights)


def _adapter_name(number: int) -> str:
    return f"adapter_{number}"

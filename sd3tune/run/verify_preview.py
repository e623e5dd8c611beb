"""Comparison of a run's preview with the same picture drawn by diffusers from the exported adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from sd3tune.adapter.embedding import as_read, embedding_beside
from sd3tune.adapter.file import Adapter
from sd3tune.adapter.reference_pipeline import add_tokens, drawing_pipeline, load_into, text_pipeline
from sd3tune.config.run_folder import read_run_file
from sd3tune.encode.resources import release
from sd3tune.errors import AdapterError, RunError
from sd3tune.model.base.base import Base
from sd3tune.model.load.components import load_vae, vae_dtype
from sd3tune.run.previews import Preview, previews_of, run_of, step_of
from sd3tune.runtime.device import choose_dtype, dtype_name, gpu_of
from sd3tune.sampling.sampler import add_offset

MIN_PSNR = 40.0
"""Minimum PSNR in dB between two drawings with the same weights and precision; rounding stays well above it."""


def compare_with_preview(adapter: Adapter, base: Base, dtype: str, device: torch.device) -> str:
    """Return a line with the PSNR, or with the reason for having none.

    A new pipeline with the file redraws the first preview of the exported step, with its seed and settings. `dtype` is
    the precision; `auto` is the run's. Raises AdapterError if the pictures differ in the run's precision and on its
    device type.
    """
    found = _find(adapter, base)
    if isinstance(found, str):
        return f"no preview to compare with: {found}"
    used = _dtype(dtype, adapter, device)
    figure = psnr(Image.open(found.preview.path), _draw(adapter, base, found.preview, used, device))
    what = f"{found.preview.path.name}, a preview of step {found.preview.step}, drawn again by diffusers"
    if math.isinf(figure):
        return f"{what}: equal to the pixel"
    then, now = (adapter.contract["dtype"], found.device), (dtype_name(used), device.type)
    if then != now:
        return f"{what}: PSNR {figure:.1f} dB, in {now[0]} on {now[1]}, and {then[0]} on {then[1]} in training"
    if figure < MIN_PSNR:
        raise AdapterError(
            f"{adapter.path}: with it, diffusers draws another picture than the training did: {what}, PSNR "
            f"{figure:.1f} dB; the file is not the one that drew it"
        )
    return f"{what}: PSNR {figure:.1f} dB"


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two 8-bit pictures in dB: inf if equal, -inf if sizes differ."""
    if one.size != other.size:
        return -math.inf
    first, second = (pil_to_tensor(image.convert("RGB")).double() for image in (one, other))
    error = (first - second).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


@dataclass(frozen=True)
class _Found:
    preview: Preview
    device: str
    """Type of the device that drew it."""


def _find(adapter: Adapter, base: Base) -> _Found | str:
    """Return the preview drawn with these weights, or the reason for having none."""
    run = run_of(adapter.path)
    if run is None:
        return "the file does not lie in the folder of a run"
    if adapter.contract.get("base_fingerprint") != base.fingerprint("transformer"):
        return f"it was trained on {adapter.contract.get('base', 'something else')}, and this is {base.name}"
    try:
        return _find_in(run, adapter)
    except (OSError, ValueError, LookupError) as error:
        return f"the folder of its run is damaged: {error}"


def _find_in(run: Path, adapter: Adapter) -> _Found | str:
    step = step_of(adapter.path, run)
    if step is None:
        return "the file is not an export of a finished run"
    drawn = [preview for preview in previews_of(run) if preview.step == step]
    same = [preview for preview in drawn if preview.recipe["weights"] == adapter.contract.get("weights")]
    if not same:
        return f"the run drew none at step {step}" + " with these weights" * bool(drawn)
    return _Found(same[0], read_run_file(run)["device"])


def _dtype(asked: str, adapter: Adapter, device: torch.device) -> torch.dtype:
    gpu = gpu_of(device)
    try:
        return choose_dtype(adapter.contract["dtype"] if asked == "auto" else asked, gpu, "--dtype")
    except RunError:  # this GPU has no bf16
        return choose_dtype("auto", gpu)


@torch.no_grad()
def _draw(adapter: Adapter, base: Base, preview: Preview, dtype: torch.dtype, device: torch.device) -> Image.Image:
    """Redraw a preview with diffusers. Text encoders are freed before the transformer is loaded."""
    contract, recipe = adapter.contract, preview.recipe
    texts = text_pipeline(base, contract["encoders"], dtype, device)
    if adapter.text_parts:
        load_into(texts, adapter)
    learned = [one] if (one := embedding_beside(adapter)) is not None else []
    for one in learned:
        add_tokens(texts, one)
    prompt, negative = recipe["prompt"], recipe.get("negative", "")
    clip, clip_negative, t5, t5_negative = (
        as_read(name, text, learned) for name in ("clip_l", "t5") for text in (prompt, negative)
    )
    embeds = texts.encode_prompt(
        clip, None, t5, device=device, negative_prompt=clip_negative, negative_prompt_3=t5_negative,
        do_classifier_free_guidance=recipe["guidance"] > 1, max_sequence_length=contract["max_sequence_length"],
    )  # fmt: skip
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    del texts
    release(device)
    vae = load_vae(base, vae_dtype(dtype), device)
    pipeline = drawing_pipeline(base, dtype, device, vae)
    load_into(pipeline, adapter)
    start, offset = torch.Generator().manual_seed(recipe["seed"]), recipe.get("noise_offset", 0.0)
    width, height = recipe.get("size", [contract["resolution"]] * 2)
    factor = pipeline.vae_scale_factor
    shape = (1, pipeline.transformer.config.in_channels, height // factor, width // factor)
    noise = torch.randn(shape, generator=start, dtype=dtype)
    latents = pipeline(
        **dict(zip(names, embeds, strict=True)), height=height, width=width,
        num_inference_steps=recipe["steps"], guidance_scale=recipe["guidance"],
        latents=add_offset(noise, [recipe["seed"]], offset), output_type="latent", **_skipped_layers(recipe),
    ).images  # fmt: skip
    return _decode(vae, latents, pipeline.image_processor)


def _skipped_layers(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pipeline's arguments for skip-layer guidance, if the preview has it."""
    slg = recipe.get("slg")
    if slg is None:
        return {}
    shares = {f"skip_layer_guidance_{name}": slg[name] for name in ("scale", "start", "stop")}
    return {"skip_guidance_layers": slg["layers"], **shares}


def _decode(vae: AutoencoderKL, latents: torch.Tensor, processor: Any) -> Image.Image:
    """Decode latents as the pipeline does, but in the VAE's own precision."""
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    image: Image.Image = processor.postprocess(vae.decode(scaled, return_dict=False)[0], output_type="pil")[0]
    return image

"""`sd3tune lora verify`: check that a fresh diffusers pipeline loads an adapter whole, and predicts differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from sd3tune.adapter.attach import match
from sd3tune.adapter.derived import notes_of
from sd3tune.adapter.file import Adapter, read_adapter
from sd3tune.adapter.layouts import MAGNITUDE
from sd3tune.adapter.lycoris import product
from sd3tune.adapter.rearrange import arrange, first_of
from sd3tune.adapter.reference_pipeline import NAME, drawing_pipeline, load_into
from sd3tune.adapter.text_encoders import match_text
from sd3tune.adapter.text_layouts import by_encoder
from sd3tune.encode.resources import release
from sd3tune.errors import AdapterError
from sd3tune.inference.conditions import find_base
from sd3tune.model.base.parts import ENCODER_OF
from sd3tune.model.load.components import empty_transformer
from sd3tune.model.lora.layers import adapter_layers, parameters_of
from sd3tune.run.verify_preview import compare_with_preview
from sd3tune.runtime.device import choose_dtype, dtype_name, gpu_of, make_accelerator

_SIDE, _TOKENS = 64, 32


def verify_lora(
    location: Path, base: str | None, dtype: str, preview: bool = True, *, transformer_only: bool = False
) -> list[str]:
    """Check an adapter and return lines that list the checks. Raises AdapterError at the first failed check.

    The pipeline is diffusers' own, with the transformer of `base` (None: the base named by the adapter) and random
    text. Files in diffusers' layout are loaded by name, files in other layouts as `lora convert` would write them.
    With `preview`, a preview of the run is drawn again and compared.
    """
    adapter = read_adapter(location, transformer_only=transformer_only)
    device = make_accelerator().device
    torch_dtype = choose_dtype(dtype, gpu_of(device), "--dtype")
    found = find_base(base, [adapter])
    counted = match(empty_transformer(found), adapter)
    if counted.unmatched:
        raise AdapterError(
            f"{adapter.path}: {len(counted.unmatched)} of {len(adapter.sizes)} modules are not in {found.name}: "
            f"{first_of(counted.unmatched)}; it was made for another base"
        )
    match_text(found, adapter)
    arrange(adapter.whole(), "diffusers")  # refuses T5 by name
    encoders = [ENCODER_OF[part] for part in adapter.text_parts]
    pipeline = drawing_pipeline(found, torch_dtype, device, encoders=encoders)
    before = _one_step(pipeline)
    load_into(pipeline, adapter)
    _check_layers(adapter, pipeline.transformer)
    for part in adapter.text_parts:
        _check_layers(adapter.of_part(part), getattr(pipeline, part))
    after = _one_step(pipeline)
    if not after.isfinite().all():
        raise AdapterError(
            f"{adapter.path}: the prediction of {found.name} is NaN or infinite with it, and finite without it"
        )
    change = ((after - before).norm() / before.norm()).item()
    if change == 0:
        raise AdapterError(f"{adapter.path}: it does not change the prediction of {found.name}: its B are zero, or too "
                           f"small for {dtype_name(torch_dtype)}")  # fmt: skip
    lines = [
        f"{adapter.path}: {counted.matched} tensors of {len(adapter.sizes)} modules loaded by diffusers into "
        f"{found.name}, none left over",
        f"one step in {dtype_name(torch_dtype)}: finite, and {change:.2%} away from the base's",
        *([f"also loaded into text encoders: {by_encoder(adapter.text_factors)} modules"] if encoders else []),
        *notes_of(adapter),
    ]
    del pipeline
    release(device)
    return [*lines, compare_with_preview(adapter, found, dtype, device)] if preview else lines


def _check_layers(adapter: Adapter, transformer: Any) -> None:
    """Raise AdapterError unless diffusers has adapted exactly the file's modules, with its weights."""
    layers = adapter_layers(transformer)
    folded = adapter.folded()
    missed = [name for name in adapter.sizes if name not in layers or not parameters_of(layers[name], NAME)]
    more = [name for name in layers if name not in adapter.sizes]
    if missed or more:
        what = f"skipped {first_of(missed)}" if missed else f"also adapted {first_of(more)}"
        raise AdapterError(f"{adapter.path}: diffusers {what}")
    for name, parts in adapter.lycoris.items():
        if not _close(layers[name].get_delta_weight(NAME).float().cpu(), product(parts)):
            raise AdapterError(f"{adapter.path}: {name}: diffusers loaded other weights or another alpha")
    for name, magnitude in adapter.magnitudes.items():
        if not _close(parameters_of(layers[name], NAME)[MAGNITUDE].float().cpu(), magnitude):
            raise AdapterError(f"{adapter.path}: {name}: diffusers loaded another magnitude")
    for name, (down, up) in folded.items():
        layer: Any = layers[name]
        held = layer.lora_B[NAME].weight.float().cpu() * layer.scaling[NAME]
        if not (_close(held.flatten(1), up) and _close(layer.lora_A[NAME].weight.float().cpu().flatten(1), down)):
            raise AdapterError(f"{adapter.path}: {name}: diffusers loaded other weights or another alpha")


def _close(held: Tensor, meant: Tensor) -> bool:
    """Return True if both are equal up to rounding in the model's dtype."""
    return held.shape == meant.shape and torch.allclose(held, meant, rtol=1e-2, atol=1e-6)


def _one_step(pipeline: StableDiffusion3Pipeline) -> Tensor:
    """Return latents (fp32, CPU) after one step from fixed noise, with fixed random text embeddings."""
    transformer = pipeline.transformer
    source = torch.Generator().manual_seed(0)
    place: dict[str, Any] = {"device": transformer.device, "dtype": transformer.dtype}
    text = torch.randn(1, _TOKENS, transformer.config.joint_attention_dim, generator=source)
    pooled = torch.randn(1, transformer.config.pooled_projection_dim, generator=source)
    latents = torch.randn(1, transformer.config.in_channels, _SIDE // 8, _SIDE // 8, generator=source)
    drawn = pipeline(
        prompt_embeds=text.to(**place), pooled_prompt_embeds=pooled.to(**place), latents=latents.to(**place),
        height=_SIDE, width=_SIDE, num_inference_steps=1, guidance_scale=1.0, output_type="latent",
    )  # fmt: skip
    return drawn.images.float().cpu()

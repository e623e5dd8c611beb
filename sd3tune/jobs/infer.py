"""`sd3tune infer`: images from adapters and models, with the conditioning that they were trained under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sd3tune.encode.resources import release
from sd3tune.errors import RunError
from sd3tune.jobs.conditions import Conditions, Request, check_request, check_size, parse_lora, settle_conditions
from sd3tune.jobs.machine import choose_dtype, gpu_of, make_accelerator
from sd3tune.jobs.pictures import recipe, write_images
from sd3tune.jobs.prompts import encode_prompts
from sd3tune.model.adapter_io import Adapter, attach, match
from sd3tune.model.components import (
    empty_transformer,
    load_scheduler,
    load_transformer,
    load_vae,
)
from sd3tune.model.hub_adapter import load_adapter
from sd3tune.sampling.sampler import Conditioning, sample_latents, to_image


@dataclass(frozen=True)
class _Prompt:
    positive: Conditioning
    negative: Conditioning


def run_infer(request: Request) -> list[Path]:
    """Draw `request.num` images and, beside them, one picture of before and after. Returns the files written."""
    check_request(request)
    adapters = [(load_adapter(path), weight) for path, weight in map(parse_lora, request.loras)]
    device = make_accelerator().device
    dtype = choose_dtype(request.dtype, gpu_of(device), "--dtype")
    conditions = settle_conditions(request, [adapter for adapter, _ in adapters])
    skeleton = empty_transformer(conditions.base)
    check_size(conditions.sampler, skeleton)
    for adapter, _ in adapters:
        match(skeleton, adapter)  # before anything large is loaded
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out: {request.out} cannot be made: {error.strerror}; choose another folder") from error

    texts = [request.prompt, request.negative]
    prompt = _Prompt(*encode_prompts(conditions.base, conditions.encoders, texts, conditions.t5_length, dtype, device))
    drawn = _draw(request, conditions, prompt, adapters, dtype, device)
    vae = load_vae(conditions.base, torch.float32 if dtype is torch.float16 else dtype, device)
    images = {name: [to_image(vae, latents) for latents in of] for name, of in drawn.items()}
    return write_images(request, recipe(request, conditions, adapters, dtype), images)


def _draw(
    request: Request,
    conditions: Conditions,
    prompt: _Prompt,
    adapters: Sequence[tuple[Adapter, float]],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, list[torch.Tensor]]:
    """Latents by picture: `after` with the adapters and, if wanted, `before` without."""
    transformer = load_transformer(conditions.base, dtype, device)
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, (adapter, weight) in zip(names, adapters, strict=True):
        counted = attach(transformer, adapter, name)
        print(f"{adapter.label}: {counted.matched} tensors loaded, weight {weight:g}")
        if counted.unmatched:
            some = ", ".join(counted.unmatched[:3])
            print(f"warning: {len(counted.unmatched)} of its modules are not in this base: {some}")
    if adapters:
        transformer.set_adapters(names, [weight for _, weight in adapters])
    passes = ["after"] + (["before"] if adapters and request.before else [])
    scheduler = load_scheduler(conditions.base)
    drawn: dict[str, list[torch.Tensor]] = {}
    total = len(passes) * request.num * request.steps
    with tqdm(total=total, desc="drawing", unit="step") as bar:
        for name in passes:
            if name == "before":
                transformer.disable_adapters()
            drawn[name] = [
                sample_latents(
                    transformer,
                    scheduler,
                    prompt.positive,
                    prompt.negative,
                    conditions.sampler,
                    [request.seed + number],
                    on_step=bar.update,
                )
                for number in range(request.num)
            ]
    del transformer
    release(device)
    return drawn

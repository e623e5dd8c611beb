"""`python -m benchmarks.checkpointing`: host time of a step by kind of gradient checkpointing, in turns.

`torch` is torch's own selective checkpointing, which runs Python around every operation. On the CPU, the model has the
depth of SD3.5-medium and a width of 16, so that calls take the time and not products. With `--device cuda`, it has its
full size, in bf16 at 1024 px; kernels run beside the host there, so CPU time is the host's.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from benchmarks.gpu.models import random_on_device
from sd3tune.config.sections.model import ModelConfig
from sd3tune.data.sampler import generator
from sd3tune.model.base.resolve import shape_of_base
from sd3tune.model.compute.checkpointing import checkpoint_blocks
from sd3tune.model.compute.fast import use_fast_path
from sd3tune.model.lora.layers import Layer, inject_lora
from sd3tune.model.lora.targets import select_modules

KINDS = ("none", "block", "selective", "torch")
KERNELS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
NARROW = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16, "joint_attention_dim": 16}
STEPS = 3
"""Steps of each kind per round."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpointing", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(1)
    step = stepper(adapted(device), *((1024, 333) if device.type == "cuda" else (64, 8)))
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind in KINDS:
            step(kind)
            start = time.process_time()
            for _ in range(STEPS):
                step(kind)
            seconds[kind].append((time.process_time() - start) / STEPS)
    print("| checkpointing | host, CPU ms per step | ratio to none |\n| --- | --- | --- |")
    for kind, found in seconds.items():
        ratio = statistics.median(one / none for one, none in zip(found, seconds["none"], strict=True))
        print(f"| {kind} | {statistics.median(found) * 1000:.0f} | {ratio:.2f} |")
    return 0


def adapted(device: torch.device) -> SD3Transformer2DModel:
    """Return a transformer of SD3.5-medium's depth with LoRA on its attention."""
    base = shape_of_base(ModelConfig(base="stabilityai/stable-diffusion-3.5-medium"))
    if device.type == "cuda":
        transformer = random_on_device(base, torch.bfloat16, device)
    else:
        transformer = SD3Transformer2DModel.from_config({**base.config("transformer"), **NARROW})
    transformer.requires_grad_(False)
    layers = {name: Layer(16, 16.0) for name in select_modules(transformer, "attention", None)}
    inject_lora(transformer, layers, lambda name: generator(0, name))
    return nn.Module.to(transformer, transformer.dtype)


def stepper(transformer: SD3Transformer2DModel, pixels: int, tokens: int) -> Callable[[str], None]:
    """Return a forward and a backward pass for an image of `pixels` squared, called with the kind of checkpointing."""
    config, device = transformer.config, transformer.device
    create = functools.partial(torch.ones, dtype=transformer.dtype, device=device)
    inputs = {
        "hidden_states": create(1, config.in_channels, pixels // 8, pixels // 8),
        "timestep": torch.ones(1, device=device),
        "encoder_hidden_states": create(1, tokens, config.joint_attention_dim),
        "pooled_projections": create(1, config.pooled_projection_dim),
    }
    kernels = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in KERNELS]
    context = functools.partial(create_selective_checkpoint_contexts, kernels)
    by_torch: Any = functools.partial(checkpoint, use_reentrant=False, context_fn=context)

    def step(kind: str) -> None:
        transformer.disable_gradient_checkpointing()
        checkpoint_blocks(transformer, "none" if kind == "torch" else kind)
        if kind == "torch":
            transformer.enable_gradient_checkpointing(by_torch)
        use_fast_path(transformer)
        transformer.zero_grad()
        transformer(**inputs, return_dict=False)[0].square().mean().backward()

    return step


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.from_scratch [--rounds N]`: the speed of examples/sd3_from_scratch beside diffusers.

Forward and backward passes of the transformer on random weights, in turns, timed by the CPU time of the process. Prints
diffusers' time divided by ours for each shape, and the time of three matrices for queries, keys and values divided by
that of one: medians over the rounds, with quartiles. Above 1, ours is faster. Writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from examples.sd3_from_scratch.checkpoint import MMDIT, renamed
from examples.sd3_from_scratch.mmdit import MMDiT

SHAPES = {"64 px, 16 tokens": (6, 6, 32, 8), "512 px, 1024 tokens": (4, 6, 64, 64)}
"""Blocks, heads, their width, and the side of the latents."""


def timed(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def ratio(theirs: Callable[[], object], ours: Callable[[], object], rounds: int) -> str:
    """Return the median of theirs / ours with its quartiles; the order of the two alternates."""
    found = []
    for number in range(rounds + 1):
        first, second = (theirs, ours) if number % 2 else (ours, theirs)
        one, other = timed(first), timed(second)
        found.append(one / other if number % 2 else other / one)
    low, middle, high = statistics.quantiles(found[1:], n=4)  # the first round warms up
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def transformers(blocks: int, heads: int, width: int, side: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a step of diffusers' transformer and one of ours, with the same weights and inputs."""
    config = {
        "num_layers": blocks, "num_attention_heads": heads, "attention_head_dim": width, "sample_size": side,
        "pos_embed_max_size": side, "joint_attention_dim": 128, "pooled_projection_dim": 112, "patch_size": 2,
        "caption_projection_dim": heads * width, "in_channels": 16, "out_channels": 16, "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }  # fmt: skip
    theirs, ours = SD3Transformer2DModel(**config), MMDiT(config)
    ours.load_state_dict(fitted(renamed(theirs.state_dict(), MMDIT, heads * width), ours))
    latents, sigma = torch.randn(2, 16, side, side), torch.rand(2)
    text, pooled = torch.randn(2, 93, 128), torch.randn(2, 112)

    def step_of_theirs() -> None:
        theirs(latents, text, pooled, 1000 * sigma, return_dict=False)[0].square().mean().backward()

    def step_of_ours() -> None:
        ours(latents, sigma, text, pooled).square().mean().backward()

    return step_of_theirs, step_of_ours


def fitted(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.reshape(model.state_dict()[name].shape) for name, tensor in tensors.items()}


def matrices(width: int, tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return the products of three matrices, and of the one that consists of them."""
    x, joint = torch.randn(2 * tokens, width), torch.randn(3 * width, width)
    parts = joint.chunk(3)
    return lambda: [x @ part.T for part in parts], lambda: x @ joint.T


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.from_scratch")
    parser.add_argument("--rounds", type=int, default=24)
    rounds = parser.parse_args(arguments).rounds
    torch.manual_seed(0)
    for title, shape in SHAPES.items():
        print(f"{title}: {ratio(*transformers(*shape), rounds)} of diffusers' speed")
    for width, tokens in ((192, 16), (1536, 1024)):
        title = f"one matrix for q, k and v, {width} wide, {tokens} tokens"
        print(f"{title}: {ratio(*matrices(width, tokens), rounds)} of three matrices' speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

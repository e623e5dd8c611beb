"""The measured models, and the cells of the table: model, dtype and duration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_transformer

CLIP_TOKENS = T5_TOKENS = 77
BATCH_SIZE = 2
RANK = 16


@dataclass(frozen=True)
class Model:
    """A transformer with random weights, and the sizes of its inputs."""

    description: str
    build: Callable[[torch.dtype], SD3Transformer2DModel]
    latent_side: int
    clip_widths: dict[str, int]

    @property
    def image_tokens(self) -> int:
        return (self.latent_side // 2) ** 2


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    model: str
    dtype: str
    steps: int
    """Optimizer steps of each side per round."""
    seconds: float
    """Time budget, which determines the number of rounds."""
    target: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model}-{self.dtype}"


def small_transformer(dtype: torch.dtype) -> SD3Transformer2DModel:
    """Return a small SD3.5-medium: QK-norm, `attn2` in half of the blocks, the real text widths; 36 M parameters."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=64,
            pos_embed_max_size=96,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=6,
            num_attention_heads=6,
            attention_head_dim=64,
            caption_projection_dim=6 * 64,
            joint_attention_dim=4096,
            pooled_projection_dim=768 + 1280,
            qk_norm="rms_norm",
            dual_attention_layers=(0, 1, 2),
        )
    return nn.Module.to(transformer, dtype).eval().requires_grad_(False)  # diffusers' own `to` gives a needless warning


MODELS = {
    "small": Model(
        "6 blocks, 6 heads of 64: compute dominates", small_transformer, 64, {"clip_l": 768, "clip_g": 1280}
    ),
    "tiny": Model(
        "the offline base, 4 blocks, 4 heads of 16: overheads dominate",
        lambda dtype: load_transformer(resolve_base("tiny"), dtype),
        8,
        {"clip_l": 16, "clip_g": 32},
    ),
}

CELLS = {
    cell.name: cell
    for cell in (
        Cell("small", "fp32", steps=1, seconds=90, target=1.03),
        Cell("small", "bf16", steps=1, seconds=40, target=1.15),
        Cell("tiny", "fp32", steps=10, seconds=25),
    )
}

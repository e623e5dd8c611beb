"""Hoist layers that depend only on timestep and pooled text, or on the image size, out of the step.

The adaLN linears (Peebles and Xie 2023) compute scales, shifts and gates from timestep and pooled text. Both are known
many steps ahead. The linears hold a third of a base's weights. Here they are removed from the module tree, so they stay
on the CPU when the model moves to its device, and are applied for many steps at once. The grid of position embeddings
stays on the CPU too, as an image needs only its centre.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

Modulation = Sequence[Tensor]
"""The output of each adaLN linear for one batch, [B, 2 to 9 widths], in the model's order."""

_LAYERS = "adaln_ahead"
CROPS = 4
"""Number of image sizes whose position embeddings are cached on the device."""


class AheadLinear(nn.Module):
    """Replacement for an adaLN linear and its SiLU. Returns the modulation computed ahead, or else computes it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        on_meta = linear.weight.is_meta
        # A module in a tuple is not registered, so the model neither moves nor saves it.
        self._kept = (linear if on_meta else linear.to("cpu"),)
        self.rows: Tensor | None = None

    @property
    def linear(self) -> nn.Linear:
        return self._kept[0]

    def apply_to(self, activated: Sequence[Tensor]) -> list[Tensor]:
        """Return the linear's output for each input. Its weights are copied to the inputs' device once for all."""
        device = activated[0].device
        weight = self.linear.weight.to(device, non_blocking=True)
        bias = None if self.linear.bias is None else self.linear.bias.to(device, non_blocking=True)
        return [F.linear(one, weight, bias) for one in activated]

    def forward(self, temb: Tensor) -> Tensor:
        return self.apply_to([F.silu(temb)])[0] if self.rows is None else self.rows


def hoist(transformer: SD3Transformer2DModel) -> None:
    """Remove the adaLN linears and the position grid from the module tree; outputs stay bit-equal.

    They do not move to a device with the model, and must not be trained.
    """
    layers = []
    for norm in _adaptive_norms(transformer):
        norm.linear, norm.silu = AheadLinear(norm.linear), nn.Identity()
        layers.append(norm.linear)
    setattr(transformer, _LAYERS, tuple(layers))
    _crop_ahead(transformer.pos_embed)


def _crop_ahead(patches: PatchEmbed) -> None:
    if not patches.pos_embed_max_size or patches.pos_embed is None:
        return
    grid = patches.pos_embed if patches.pos_embed.is_meta else patches.pos_embed.cpu()

    @functools.lru_cache(maxsize=CROPS)
    def crop_for(height: int, width: int, device: torch.device) -> Tensor:
        placeholder, patches.pos_embed = patches.pos_embed, grid
        try:
            crop: Tensor = PatchEmbed.cropped_pos_embed(patches, height, width)
        finally:
            patches.pos_embed = placeholder
        return crop.to(device)

    # On the model's device, with which it moves. Diffusers' forward takes None for a model without positions.
    patches.pos_embed = patches.pos_embed[:, :0].clone()
    patches.cropped_pos_embed = lambda height, width: crop_for(height, width, patches.pos_embed.device)


def hoisted(transformer: nn.Module) -> tuple[AheadLinear, ...]:
    """Return the hoisted adaLN linears in the model's order; empty for a model that is not hoisted."""
    found: tuple[AheadLinear, ...] = getattr(transformer, _LAYERS, ())
    return found


def keep_blocks(transformer: SD3Transformer2DModel, numbers: Collection[int]) -> None:
    """Remove all other blocks from the model, with their hoisted linears; the remaining blocks keep their names."""
    children = transformer.transformer_blocks._modules
    for name in [name for name in children if int(name) not in numbers]:
        del children[name]
    if hoisted(transformer):
        setattr(transformer, _LAYERS, tuple(norm.linear for norm in _adaptive_norms(transformer)))


def row_bytes(transformer: SD3Transformer2DModel) -> int:
    """Return the bytes of one sample's modulation."""
    kept = [layer.linear for layer in hoisted(transformer)]
    return sum(linear.out_features * linear.weight.dtype.itemsize for linear in kept)


@torch.no_grad()
def compute_ahead(transformer: SD3Transformer2DModel, conditions: Sequence[tuple[Tensor, Tensor]]) -> list[Modulation]:
    """Return the modulations for each pair of timestep [B] fp32 and pooled_prompt_embeds [B, width], on their device.

    Each is computed in its own shape, so it is bit-equal to the model's own computation.
    """
    activated = [F.silu(transformer.time_text_embed(timestep, pooled)) for timestep, pooled in conditions]
    per_linear = [linear.apply_to(activated) for linear in hoisted(transformer)]
    return list(zip(*per_linear, strict=True))


def modulate(transformer: SD3Transformer2DModel, modulation: Modulation | None) -> None:
    """Make the model use this modulation, or compute its own for None. Call it again only after the backward pass.

    A model that is not hoisted accepts None only.
    """
    layers = hoisted(transformer)
    for layer, rows in zip(layers, [None] * len(layers) if modulation is None else modulation, strict=True):
        layer.rows = rows


def _adaptive_norms(transformer: SD3Transformer2DModel) -> Iterator[Any]:
    for block in transformer.transformer_blocks:
        yield block.norm1
        yield block.norm1_context
    yield transformer.norm_out

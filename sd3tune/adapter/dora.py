"""DoRA (Liu et al. 2024): the weights that a trained magnitude makes of a base's weights and their update.

A magnitude per output, [out] or [out, 1], is PEFT's and LyCORIS' default; one per input is [1, in]. Training divides by
the norm of the updated weights. ComfyUI divides a magnitude per output by the norm of the base's weights instead
(`weight_decompose` in comfy/weight_adapter/base.py), so files for it hold magnitudes for that norm: `of_base`.
"""

from __future__ import annotations

import torch
from torch import Tensor

OF_BASE_KEY, OF_BASE = "sd3tune_dora_scale", "for the norm of the base's weights"
"""Metadata of a file whose magnitudes are made for ComfyUI's formula."""


_LEAST = 1e-12  # a row of zeros stays zero


def per_output(magnitude: Tensor) -> bool:
    """Return True for one magnitude per output, False for one per input."""
    return magnitude.ndim == 1


def norms(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return the norms of the rows [out, 1] of a weight, or of its columns [1, in] for a magnitude per input."""
    found: Tensor = torch.linalg.vector_norm(weight, dim=1 if per_output(magnitude) else 0, keepdim=True)
    return found.clamp(min=_LEAST)


def decomposed(weight: Tensor, update: Tensor, magnitude: Tensor, of_base: bool = False) -> Tensor:
    """Return m (W + U) / |W + U| [out, in] for the base's weight W, an update U and a magnitude m.

    With `of_base`, m is divided by |W|, as ComfyUI does.
    """
    updated = weight + update
    column = magnitude[:, None] if per_output(magnitude) else magnitude
    return updated * (column / norms(weight if of_base else updated, magnitude))


def magnitude_for(weight: Tensor, update: Tensor, magnitude: Tensor, of_base: bool) -> Tensor:
    """Return a magnitude per output [out] for one norm from that for the other: of the base if `of_base` is False."""
    base, updated = (norms(one, magnitude)[:, 0] for one in (weight, weight + update))
    return magnitude * (updated / base if of_base else base / updated)

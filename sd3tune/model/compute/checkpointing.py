"""Gradient checkpointing of transformer blocks: activations are recomputed instead of kept."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sd3tune.model.compute.fast import cpu

ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    cpu.OPERATION,
]
"""Attention kernels that do not form the matrix of all token pairs. Other kernels' results are never kept."""

_HOOKS = "respect_saved_tensors_hooks"  # newer versions of torch: also reports kept tensors to `footprint.Saved`


def checkpoint_blocks(transformer: SD3Transformer2DModel, kind: str, blocks: int | None = None) -> None:
    """Make the first `blocks` blocks (None: all) keep only their inputs for the backward pass.

    Kind `block` recomputes everything in a block; `selective` also keeps the output of attention, so attention is not
    recomputed; `none` changes nothing. Gradients are bit-equal.
    """
    if kind == "none":
        return
    chosen = set(transformer.transformer_blocks[:blocks])
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, ATTENTION)
        if _HOOKS in inspect.signature(checkpoint).parameters:
            options[_HOOKS] = True

    def compute(block: nn.Module, *inputs: Tensor) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = checkpoint(block, *inputs, **options) if block in chosen else block(*inputs)
        return outputs

    transformer.enable_gradient_checkpointing(compute)

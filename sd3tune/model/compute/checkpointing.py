"""Gradient checkpointing of transformer blocks: activations that are not kept are computed again."""

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
"""The kernels of attention that form no matrix of all pairs of tokens. Where torch has to form it, it is never kept."""

_HOOKS = "respect_saved_tensors_hooks"  # of newer versions of torch: what is kept is shown to `footprint.Saved`, too


def checkpoint_blocks(transformer: SD3Transformer2DModel, kind: str, blocks: int | None = None) -> None:
    """From now on the first `blocks` blocks, None for all, keep nothing but their inputs for the backward pass.

    With kind `selective` they also keep what attention made, so that attention alone is not computed again; with
    `block` they do not; with `none` nothing changes. Gradients are the same to the bit.
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

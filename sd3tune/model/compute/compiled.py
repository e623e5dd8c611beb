"""Regional compilation: torch compiles each kind of transformer block by itself, in one graph.

A graph is made in the first step of each image size and T5 length, and used for all blocks of its kind. Only the
training step uses it: previews, held-out loss and reports compute as diffusers does (see `fast.plain_path`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from diffusers import SD3Transformer2DModel

from sd3tune.errors import RunError

MOST_GRAPHS = 256
"""Limit on the graphs of a run: some four kinds of blocks, times image sizes, times T5 lengths."""


def compile_blocks(transformer: SD3Transformer2DModel, backend: str = "inductor") -> None:
    """Compile the blocks' training step with static shapes, on first use. Parameters and state dict do not change.

    The blocks must not be quantised, draw no random numbers, and not be on the fast path.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
    for block in transformer.transformer_blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)


@contextlib.contextmanager
def explain_compile_errors() -> Iterator[None]:
    """Raise RunError in place of an error of torch's compiler."""
    try:
        yield
    except RuntimeError as error:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or not isinstance(error, dynamo.exc.TorchDynamoException):
            raise
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"train.compile: blocks: {reason}; set train.compile: none") from None

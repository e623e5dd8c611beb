"""Initial weights of a transformer that is trained from scratch.

They follow DiT (Peebles & Xie 2023, `initialize_weights` in its code), from which the MMDiT descends. Linear layers and
the patch projection are Xavier-uniform with zero biases; the MLPs of timestep and pooled text are N(0, 0.02). The adaLN
linears and the last projection are zero, so every block starts as the identity and the velocity as zero.
"""

from __future__ import annotations

import hashlib
import math

import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel
from torch import Tensor

from sd3tune.model.base.base import RandomTransformer
from sd3tune.model.base.parts import is_modulation

_STANDARD_DEVIATION = 0.02


def random_transformer(random: RandomTransformer, dtype: torch.dtype) -> SD3Transformer2DModel:
    """Return a randomly initialized transformer. A weight depends only on the seed and the parameter's name.

    The global random state does not change.
    """
    with init_empty_weights(include_buffers=False):
        transformer = SD3Transformer2DModel.from_config(random.config)
    parameters = {
        name: _draw(name, parameter.shape, _generator(random.seed, name)).to(dtype)
        for name, parameter in transformer.named_parameters()
    }
    transformer.load_state_dict(parameters, strict=False, assign=True)
    for buffer in transformer.buffers():
        buffer.data = buffer.to(dtype)
    return transformer


def _draw(name: str, shape: torch.Size, source: torch.Generator) -> Tensor:
    """Return one parameter in fp32."""
    if name.endswith("bias") or is_modulation(name) or name.startswith("proj_out"):
        return torch.zeros(shape)
    if len(shape) == 1:  # RMS norms
        return torch.ones(shape)
    if name.startswith("time_text_embed"):
        return torch.randn(shape, generator=source) * _STANDARD_DEVIATION
    bound = math.sqrt(6 / (shape[0] + shape[1:].numel()))
    return torch.empty(shape).uniform_(-bound, bound, generator=source)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

"""Patches that let the script run in every cell, without slowing it down."""

from __future__ import annotations

import sys
from typing import Any


def without_trackers() -> None:
    """Hide trackers from both sides.

    The script imports wandb if it is installed, and writes TensorBoard files by default. Without them it starts sooner
    and does less.
    """
    for tracker in ("wandb", "tensorboard", "tensorboardX"):
        sys.modules[tracker] = None  # type: ignore[assignment]


def with_casting_vae() -> None:
    """Make the script's VAE cast its input.

    With `--cache_latents --mixed_precision bf16` the script passes bf16 pixels to its fp32 VAE, and fails. In all other
    cases the dtypes are equal already, and the cast does nothing.
    """
    from diffusers import AutoencoderKL

    encode = AutoencoderKL.encode

    def encode_in_its_dtype(vae: Any, pixels: Any, *arguments: Any, **options: Any) -> Any:
        return encode(vae, pixels.to(vae.dtype), *arguments, **options)

    AutoencoderKL.encode = encode_in_its_dtype

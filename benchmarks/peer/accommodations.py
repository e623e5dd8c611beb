"""What has to give way for the script to run in every cell. None of it makes the script slower."""

from __future__ import annotations

import sys
from typing import Any


def without_trackers() -> None:
    """Trackers count as not installed, on both sides.

    The script imports wandb whenever it is there, and writes TensorBoard files by default: without them it starts
    sooner and does less.
    """
    for tracker in ("wandb", "tensorboard", "tensorboardX"):
        sys.modules[tracker] = None  # type: ignore[assignment]


def with_casting_vae() -> None:
    """The script's VAE casts what it is given.

    With `--cache_latents --mixed_precision bf16` the script hands bf16 pixels to its fp32 VAE, and stops with an error.
    Where it runs by itself the dtypes are the same already, and the cast does nothing.
    """
    from diffusers import AutoencoderKL

    encode = AutoencoderKL.encode

    def encode_in_its_dtype(vae: Any, pixels: Any, *arguments: Any, **options: Any) -> Any:
        return encode(vae, pixels.to(vae.dtype), *arguments, **options)

    AutoencoderKL.encode = encode_in_its_dtype

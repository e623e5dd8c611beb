"""diffusers' own pipeline, to verify adapters; only the reading of the base's files is sd3tune's."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from sd3tune.adapter.file import Adapter
from sd3tune.adapter.rearrange import arrange, arrange_lycoris
from sd3tune.errors import AdapterError
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_PARTS
from sd3tune.model.load.components import empty_transformer, load_scheduler, load_text_encoder, load_transformer

NAME = "verified"
"""The adapter's name in the pipeline."""
_NO_TEXT = dict.fromkeys((part for parts in ENCODER_PARTS.values() for part in parts), None)


def drawing_pipeline(
    base: Base, dtype: torch.dtype, device: torch.device, vae: AutoencoderKL | None = None
) -> StableDiffusion3Pipeline:
    """Return the pipeline without text encoders, to draw from embeddings."""
    pipeline = StableDiffusion3Pipeline(
        transformer=load_transformer(base, dtype, device), scheduler=load_scheduler(base), vae=vae, **_NO_TEXT
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_pipeline(
    base: Base, encoders: list[str], dtype: torch.dtype, device: torch.device
) -> StableDiffusion3Pipeline:
    """Return the pipeline for `encode_prompt` only; its transformer has a config, for a missing T5, but no weights."""
    loaded = {name: load_text_encoder(base, name, dtype, device) for name in encoders}
    parts: dict[str, Any] = dict(_NO_TEXT)
    for name, encoder in loaded.items():
        tokenizer, model = ENCODER_PARTS[name]
        parts |= {tokenizer: encoder.tokenizer, model: encoder.model}
    return StableDiffusion3Pipeline(
        transformer=empty_transformer(base), scheduler=load_scheduler(base), vae=None, **parts
    )


def load_into(pipeline: StableDiffusion3Pipeline, adapter: Adapter) -> None:
    """Load the adapter's file into the pipeline, converted to diffusers' layout if necessary. Raises AdapterError."""
    if adapter.kind == "LoHa" or (adapter.magnitudes and not adapter.by_lora_layers):
        raise AdapterError(
            f"{adapter.path}: diffusers does not load this {adapter.kind}"
            "; merge it into its base (`sd3tune lora merge --into-base`), or take the nearest LoRA "
            "(`sd3tune lora convert --rank R`)"
        )
    if adapter.of_base:
        raise AdapterError(
            f"{adapter.path}: its magnitudes are for ComfyUI; `sd3tune lora convert --to diffusers` writes diffusers'"
        )
    try:
        if adapter.lycoris:
            found = str(adapter.path) if adapter.for_diffusers else arrange_lycoris(adapter.lycoris, "diffusers")
            pipeline.transformer.load_lora_adapter(found, adapter_name=NAME)
        else:
            arranged = {} if adapter.for_diffusers else arrange(adapter.folded(), "diffusers", adapter.magnitudes)
            pipeline.load_lora_weights(arranged or str(adapter.path), adapter_name=NAME)
    except Exception as error:  # two libraries may raise anything for a foreign file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise AdapterError(
            f"{adapter.path}: diffusers does not load it: {reason}; `sd3tune lora convert --to diffusers` writes what "
            "it takes"
        ) from error

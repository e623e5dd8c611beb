"""diffusers' own pipeline, to verify adapters; only the reading of the base's files is sd3tune's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from sd3tune.adapter.embedding import Embedding
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
    base: Base,
    dtype: torch.dtype,
    device: torch.device,
    vae: AutoencoderKL | None = None,
    encoders: Sequence[str] = (),
) -> StableDiffusion3Pipeline:
    """Return the pipeline to draw from embeddings; of its text encoders it has only `encoders`, without tokenizers."""
    models = {ENCODER_PARTS[name][1]: load_text_encoder(base, name, dtype, device).model for name in encoders}
    pipeline = StableDiffusion3Pipeline(
        transformer=load_transformer(base, dtype, device), scheduler=load_scheduler(base), vae=vae,
        **{**_NO_TEXT, **models},
    )  # fmt: skip
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


def add_tokens(pipeline: StableDiffusion3Pipeline, embedding: Embedding) -> None:
    """Add a learned token to the pipeline's CLIP encoders, as the card's code does."""
    for name, rows in embedding.rows.items():
        tokenizer, encoder = (getattr(pipeline, part) for part in ENCODER_PARTS[name])
        tokenizer.add_tokens(embedding.names)
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = encoder.get_input_embeddings().weight.data
        table[-len(rows) :] = rows.to(table)
        encoder.text_model.eos_token_id = tokenizer.eos_token_id


def load_into(pipeline: StableDiffusion3Pipeline, adapter: Adapter) -> None:
    """Load the adapter's file into the pipeline, converted to diffusers' layout if necessary. Raises AdapterError.

    Parts for text encoders that the pipeline lacks, or for its transformer without weights, are left out.
    """
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
    there = [part for part in adapter.text_parts if getattr(pipeline, part) is not None]
    try:
        if adapter.lycoris:
            found = str(adapter.path) if adapter.for_diffusers else arrange_lycoris(adapter.lycoris, "diffusers")
            pipeline.transformer.load_lora_adapter(found, adapter_name=NAME)
            return
        arranged = {} if adapter.for_diffusers else arrange(adapter.whole(), "diffusers", adapter.magnitudes)
        weights = arranged or str(adapter.path)
        if there == adapter.text_parts and not pipeline.transformer.pos_embed.proj.weight.is_meta:
            pipeline.load_lora_weights(weights, adapter_name=NAME)
        else:
            _load_parts(pipeline, weights, there)
    except Exception as error:  # two libraries may raise anything for a foreign file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise AdapterError(
            f"{adapter.path}: diffusers does not load it: {reason}; `sd3tune lora convert --to diffusers` writes what "
            "it takes"
        ) from error


def _load_parts(pipeline: StableDiffusion3Pipeline, weights: Any, parts: Sequence[str]) -> None:
    """Load what `load_lora_weights` loads, into the text encoders `parts` or, without any, into the transformer."""
    tensors, metadata = pipeline.lora_state_dict(weights, return_lora_metadata=True)
    if not parts:
        pipeline.load_lora_into_transformer(tensors, pipeline.transformer, adapter_name=NAME, metadata=metadata)
    for part in parts:
        pipeline.load_lora_into_text_encoder(
            tensors, None, getattr(pipeline, part), prefix=part, adapter_name=NAME, metadata=metadata
        )

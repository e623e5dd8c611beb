"""`model`: the base."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sd3tune.config.sections.section import Section

OFFLINE_BASES = ("tiny", "tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large", "nano")
"""Values of `model.base` that need no download and are never taken for a folder."""


class TextEncodersConfig(Section):
    """Files that hold one text encoder each, as ComfyUI uses them."""

    clip_l: str | None = Field(None, min_length=1, description="CLIP-L, such as `clip_l.safetensors`.")
    clip_g: str | None = Field(None, min_length=1, description="CLIP-G, such as `clip_g.safetensors`.")
    t5: str | None = Field(
        None,
        min_length=1,
        description="T5-XXL, such as `t5xxl_fp16.safetensors`; fp8 files become the run's dtype on loading, so "
        "they save disk and not memory. Not looked at with `t5: false`.",
    )


class ModelConfig(Section):
    """Which base model is trained, and in which precision it is held."""

    base: str = Field(
        "stabilityai/stable-diffusion-3.5-medium",
        min_length=1,
        description="A Hub id, a folder in diffusers' layout, a single `.safetensors` checkpoint, or an offline "
        "base: `tiny` (= `tiny-sd35-medium`), `tiny-sd3`, `tiny-sd35-large`, with random weights; `nano`, trained.",
    )
    text_encoders: TextEncodersConfig | None = Field(
        None,
        description="Text encoders from files of their own, instead of those of the base; a single-file "
        "checkpoint without encoders inside needs them.",
    )
    tokenizers: str | None = Field(
        None,
        min_length=1,
        description="A folder or Hub id with `tokenizer`, `tokenizer_2` and `tokenizer_3`; null takes the base's "
        "own, for a single file those of the Hub repository of its variant.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub base; null takes its main branch.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Precision of the frozen base: auto is fp32 on the CPU, bf16 on a GPU that has it, else "
        "fp16. The adapter's masters, gradient sums and EMA are fp32 always, and so is the optimizer's state but for "
        "`adamw8bit`.",
    )
    quantize: Literal["none"] = Field("none", description="Quantisation of the frozen base: only none so far.")
    max_sequence_length: int = Field(
        256,
        ge=1,
        le=512,
        description="T5 tokens per caption, padding included; the model attends to padding, so this is part "
        "of the conditioning and is stored in the adapter for `infer`.",
    )
    t5: bool = Field(
        True,
        description="Whether T5 is used; false replaces its embeddings by zeros and never loads its 10 GB.",
    )

"""`model`: the base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sd3tune.config.sections.key import (
    ENCODING,
    EVERY_PHASE,
    NO_PHASE,
    Identity,
    Key,
    Knob,
    is_any_path,
    looks_like_a_path,
)
from sd3tune.config.sections.section import Section

OFFLINE_BASES = ("tiny", "tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large", "nano", "nano-1")
"""Values of `model.base` that need no download and never mean a folder."""


_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # a file name, even if there is no such file
_RESOLVED = Key(Identity.RESOLVED, phases=EVERY_PHASE)
_FILE = Key(Identity.CONTENT, path=is_any_path, phases=EVERY_PHASE)


def _is_base_path(text: str, folder: Path) -> bool:
    """Return True for a folder or file, and False for an offline base or a Hub id."""
    if text in OFFLINE_BASES:
        return False
    return looks_like_a_path(text) or text.lower().endswith(_WEIGHTS) or os.path.exists(folder / text)


class TextEncodersConfig(Section):
    """Files with one text encoder each, as used by ComfyUI."""

    clip_l: Annotated[str | None, _FILE] = Field(
        None, min_length=1, description="CLIP-L, such as `clip_l.safetensors`."
    )
    clip_g: Annotated[str | None, _FILE] = Field(
        None, min_length=1, description="CLIP-G, such as `clip_g.safetensors`."
    )
    t5: Annotated[str | None, _FILE] = Field(
        None,
        min_length=1,
        description="T5-XXL, such as `t5xxl_fp16.safetensors`; fp8 files are converted to the run's dtype on loading, "
        "so they save disk space but no memory. Ignored with `t5: false`.",
    )


class TransformerConfig(Section):
    """Keys of SD3Transformer2DModel's `config.json` to change for a new transformer; null keeps the base's value.

    Widths set by the text encoders or the VAE follow from those.
    """

    num_layers: Annotated[int | None, _RESOLVED] = Field(None, ge=1, description="Number of blocks.")
    num_attention_heads: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Number of heads per attention."
    )
    attention_head_dim: Annotated[int | None, _RESOLVED] = Field(
        None, ge=2, description="Width of a head; the model's width, heads times this, is a multiple of 4."
    )
    qk_norm: Annotated[Literal["none", "rms_norm"] | None, _RESOLVED] = Field(
        None, description="Normalisation of queries and keys, as in SD3.5."
    )
    dual_attention_layers: Annotated[list[Annotated[int, Field(ge=0)]] | None, _RESOLVED] = Field(
        None, description="Blocks with a second attention over image tokens only, as in SD3.5-medium; `[]` for none."
    )
    sample_size: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Side of the default latent, an eighth of the image's side; pipelines draw that size."
    )
    patch_size: Annotated[Literal[2] | None, _RESOLVED] = Field(
        None, description="Side of a patch in latents: only 2 so far."
    )
    pos_embed_max_size: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Side of the grid of position embeddings in patches, which limits the image size."
    )
    in_channels: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Channels of the latents, as in the VAE."
    )
    out_channels: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Channels of the velocity, equal to `in_channels`."
    )
    joint_attention_dim: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Width of the text, as in T5."
    )
    pooled_projection_dim: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Width of the pooled text, the sum of CLIP-L's and CLIP-G's."
    )
    caption_projection_dim: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Width of the text inside the transformer, equal to the model's."
    )


class ModelConfig(Section):
    """The base model and its precision."""

    base: Annotated[str, Key(Identity.RESOLVED, path=_is_base_path, phases=EVERY_PHASE)] = Field(
        "stabilityai/stable-diffusion-3.5-medium",
        min_length=1,
        description="A Hub id, a folder in diffusers' layout, a single `.safetensors` checkpoint, or an offline base: "
        "`tiny` (= `tiny-sd35-medium`), `tiny-sd3`, `tiny-sd35-large`, with random weights; `nano`, "
        "trained; `nano-1`, its first version.",
    )
    init: Annotated[Literal["pretrained", "random"], _RESOLVED] = Field(
        "pretrained",
        description="Initial weights of the transformer: `random` draws them from the seed, to train from scratch; "
        "text encoders, VAE and scheduler are still the base's. Needs `method.kind: full`.",
    )
    transformer: Annotated[TransformerConfig | None, _RESOLVED] = Field(
        None, description="With `init: random`, the shape of the new transformer where it differs from the base."
    )
    text_encoders: Annotated[TextEncodersConfig | None, Key(Identity.CONTENT, phases=EVERY_PHASE)] = Field(
        None,
        description="Text encoders from separate files, instead of the base's; required for a single-file checkpoint "
        "without encoders.",
    )
    tokenizers: Annotated[str | None, Key(Identity.CONTENT, path=_is_base_path, phases=EVERY_PHASE)] = Field(
        None,
        min_length=1,
        description="A folder or Hub id with `tokenizer`, `tokenizer_2` and `tokenizer_3`; null uses the base's, or "
        "for a single file the tokenizers of its variant's Hub repository.",
    )
    revision: Annotated[str | None, _RESOLVED] = Field(
        None, description="Branch, tag or commit of a Hub base; null uses its main branch."
    )
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Key(Identity.RESOLVED, phases=EVERY_PHASE, knob=Knob(("load",), ("bf16",))),
    ] = Field(
        "auto",
        description="Compute precision: auto is fp32 on the CPU, bf16 on a GPU that supports it, else fp16. Master "
        "weights, gradient sums and EMA are always fp32, and so is the optimizer state except for `adamw8bit`.",
    )
    quantize: Annotated[
        Literal["none", "nf4", "int8"], Key(Identity.RESOLVED, knob=Knob(("load", "train"), ("nf4", "int8")))
    ] = Field(
        "none",
        description="Quantisation of the linear layers in the frozen base's blocks: `nf4` takes a quarter of bf16's "
        "memory, `int8` half, at some loss of precision and speed. Previews use the same base; so does `infer` by "
        "default.",
    )
    max_sequence_length: Annotated[int, Key(Identity.WRITTEN, contract=True, phases=EVERY_PHASE)] = Field(
        256,
        ge=1,
        le=512,
        description="T5 tokens per caption, padding included; the model attends to padding, so this is part of the "
        "conditioning and is stored with the result for `infer`.",
    )
    extra_t5_lengths: Annotated[list[Annotated[int, Field(ge=1, le=512)]], _RESOLVED] = Field(
        [],
        description="Additional T5 lengths to train at, such as `[77]`, for tools that pad to another length. Each "
        "optimizer step uses one length; these and `max_sequence_length` are used equally often. Previews and held-out "
        "loss use `max_sequence_length`. No effect with `t5: false`.",
    )
    t5: Annotated[bool, Key(Identity.WRITTEN, phases=EVERY_PHASE, knob=Knob(("encode",), (False,)))] = Field(
        True,
        description="Use T5; false replaces its embeddings by zeros and does not load its 10 GB.",
    )
    t5_quantize: Annotated[
        Literal["none", "int8"], Key(Identity.RESOLVED, phases=ENCODING, knob=Knob(("encode",), ("int8",)))
    ] = Field(
        "none",
        description="`int8` halves T5's 10 GB while captions are encoded, with slightly different embeddings; `infer` "
        "uses the same by default.",
    )
    t5_device: Annotated[
        Literal["auto", "cpu"], Key(Identity.FREE, phases=NO_PHASE, knob=Knob(("encode",), ("cpu",)))
    ] = Field(
        "auto",
        description="`cpu` runs T5 on the CPU, which is slow, but encodes each caption once and takes no GPU memory.",
    )

    @property
    def t5_lengths(self) -> list[int]:
        """All T5 lengths in training, ascending; without T5 only `max_sequence_length`."""
        return sorted({self.max_sequence_length, *(self.extra_t5_lengths if self.t5 else ())})

    @property
    def fewer_bits(self) -> dict[str, str]:
        """Quantisation key -> its form, for keys that are not `none`."""
        forms = {"quantize": self.quantize, "t5_quantize": self.t5_quantize if self.t5 else "none"}
        return {name: form for name, form in forms.items() if form != "none"}

    @model_validator(mode="after")
    def _shape_needs_random_init(self) -> ModelConfig:
        if self.transformer is not None and self.init == "pretrained":
            raise ValueError(
                "transformer sets the shape of new weights, but init is pretrained; set init: random, or remove it"
            )
        return self

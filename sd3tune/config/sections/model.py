"""`model`: the base."""

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

OFFLINE_BASES = ("tiny", "tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large", "nano")
"""Values of `model.base` that need no download and are never taken for a folder."""


_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # a file's name, though there may be no such file
_RESOLVED = Key(Identity.RESOLVED, phases=EVERY_PHASE)
_FILE = Key(Identity.CONTENT, path=is_any_path, phases=EVERY_PHASE)


def _is_base_path(text: str, folder: Path) -> bool:
    """Whether it means a folder or a file rather than an offline base or a Hub id."""
    if text in OFFLINE_BASES:
        return False
    return looks_like_a_path(text) or text.lower().endswith(_WEIGHTS) or os.path.exists(folder / text)


class TextEncodersConfig(Section):
    """Files that hold one text encoder each, as ComfyUI uses them."""

    clip_l: Annotated[str | None, _FILE] = Field(
        None, min_length=1, description="CLIP-L, such as `clip_l.safetensors`."
    )
    clip_g: Annotated[str | None, _FILE] = Field(
        None, min_length=1, description="CLIP-G, such as `clip_g.safetensors`."
    )
    t5: Annotated[str | None, _FILE] = Field(
        None,
        min_length=1,
        description="T5-XXL, such as `t5xxl_fp16.safetensors`; fp8 files become the run's dtype on loading, so "
        "they save disk and not memory. Not looked at with `t5: false`.",
    )


class TransformerConfig(Section):
    """Keys of SD3Transformer2DModel's `config.json` that a new transformer has other values for; null keeps the base's.

    Widths that the text encoders or the VAE decide follow from them.
    """

    num_layers: Annotated[int | None, _RESOLVED] = Field(None, ge=1, description="Blocks.")
    num_attention_heads: Annotated[int | None, _RESOLVED] = Field(None, ge=1, description="Heads of each attention.")
    attention_head_dim: Annotated[int | None, _RESOLVED] = Field(
        None, ge=2, description="Width of a head; heads times this is the model's width, a multiple of 4."
    )
    qk_norm: Annotated[Literal["none", "rms_norm"] | None, _RESOLVED] = Field(
        None, description="Whether queries and keys are normalised, as in SD3.5."
    )
    dual_attention_layers: Annotated[list[Annotated[int, Field(ge=0)]] | None, _RESOLVED] = Field(
        None, description="Blocks with a second attention over the image alone, as in SD3.5-medium; `[]` for none."
    )
    sample_size: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Side of the usual latent, an eighth of the picture's; pipelines draw that size."
    )
    patch_size: Annotated[Literal[2] | None, _RESOLVED] = Field(
        None, description="Side of a patch in latents: only 2 so far."
    )
    pos_embed_max_size: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Side of the grid of position embeddings in patches: no picture may be larger."
    )
    in_channels: Annotated[int | None, _RESOLVED] = Field(None, ge=1, description="Channels of the latents: the VAE's.")
    out_channels: Annotated[int | None, _RESOLVED] = Field(None, ge=1, description="Channels of the velocity: as many.")
    joint_attention_dim: Annotated[int | None, _RESOLVED] = Field(None, ge=1, description="Width of the text: T5's.")
    pooled_projection_dim: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Width of the pooled text: those of CLIP-L and CLIP-G together."
    )
    caption_projection_dim: Annotated[int | None, _RESOLVED] = Field(
        None, ge=1, description="Width of the text inside: the model's."
    )


class ModelConfig(Section):
    """Which base model is trained, and in which precision it is held."""

    base: Annotated[str, Key(Identity.RESOLVED, path=_is_base_path, phases=EVERY_PHASE)] = Field(
        "stabilityai/stable-diffusion-3.5-medium",
        min_length=1,
        description="A Hub id, a folder in diffusers' layout, a single `.safetensors` checkpoint, or an offline "
        "base: `tiny` (= `tiny-sd35-medium`), `tiny-sd3`, `tiny-sd35-large`, with random weights; `nano`, trained.",
    )
    init: Annotated[Literal["pretrained", "random"], _RESOLVED] = Field(
        "pretrained",
        description="Where the transformer's weights come from: `random` draws them from the seed, to train from "
        "scratch; text encoders, VAE and scheduler are the base's all the same. Needs `method.kind: full`.",
    )
    transformer: Annotated[TransformerConfig | None, _RESOLVED] = Field(
        None, description="With `init: random`, the shape of the new transformer where it is not the base's."
    )
    text_encoders: Annotated[TextEncodersConfig | None, Key(Identity.CONTENT, phases=EVERY_PHASE)] = Field(
        None,
        description="Text encoders from files of their own, instead of those of the base; a single-file "
        "checkpoint without encoders inside needs them.",
    )
    tokenizers: Annotated[str | None, Key(Identity.CONTENT, path=_is_base_path, phases=EVERY_PHASE)] = Field(
        None,
        min_length=1,
        description="A folder or Hub id with `tokenizer`, `tokenizer_2` and `tokenizer_3`; null takes the base's "
        "own, for a single file those of the Hub repository of its variant.",
    )
    revision: Annotated[str | None, _RESOLVED] = Field(
        None, description="Branch, tag or commit of a Hub base; null takes its main branch."
    )
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Key(Identity.RESOLVED, phases=EVERY_PHASE, knob=Knob(("load",), ("bf16",))),
    ] = Field(
        "auto",
        description="Precision that is computed in: auto is fp32 on the CPU, bf16 on a GPU that has it, else "
        "fp16. The trained weights' masters, gradient sums and EMA are fp32 always, and so is the optimizer's state "
        "but for `adamw8bit`.",
    )
    quantize: Annotated[
        Literal["none", "nf4", "int8"], Key(Identity.RESOLVED, knob=Knob(("load", "train"), ("nf4", "int8")))
    ] = Field(
        "none",
        description="How the frozen base's blocks hold their linear layers: `nf4` takes a quarter of bf16's memory, "
        "`int8` half, for some exactness and time. Previews use the same base; `infer` does unless told otherwise.",
    )
    max_sequence_length: Annotated[int, Key(Identity.WRITTEN, contract=True, phases=EVERY_PHASE)] = Field(
        256,
        ge=1,
        le=512,
        description="T5 tokens per caption, padding included; the model attends to padding, so this is part "
        "of the conditioning and is stored with the result for `infer`.",
    )
    extra_t5_lengths: Annotated[list[Annotated[int, Field(ge=1, le=512)]], _RESOLVED] = Field(
        [],
        description="More T5 lengths to train at, such as `[77]`, for tools that pad to another length: each optimizer "
        "step uses one of them or `max_sequence_length`, all equally often. Previews and held-out loss use "
        "`max_sequence_length`. No effect with `t5: false`.",
    )
    t5: Annotated[bool, Key(Identity.WRITTEN, phases=EVERY_PHASE, knob=Knob(("encode",), (False,)))] = Field(
        True,
        description="Whether T5 is used; false replaces its embeddings by zeros and never loads its 10 GB.",
    )
    t5_quantize: Annotated[
        Literal["none", "int8"], Key(Identity.RESOLVED, phases=ENCODING, knob=Knob(("encode",), ("int8",)))
    ] = Field(
        "none",
        description="`int8` holds T5 in half of its 10 GB while captions are encoded, for slightly other embeddings; "
        "`infer` does the same unless told otherwise.",
    )
    t5_device: Annotated[
        Literal["auto", "cpu"], Key(Identity.FREE, phases=NO_PHASE, knob=Knob(("encode",), ("cpu",)))
    ] = Field(
        "auto",
        description="`cpu` encodes with T5 there, slowly but each caption once, and takes none of a GPU's memory.",
    )

    @property
    def t5_lengths(self) -> list[int]:
        """All T5 lengths that are trained at, ascending; without T5 `max_sequence_length` alone."""
        return sorted({self.max_sequence_length, *(self.extra_t5_lengths if self.t5 else ())})

    @property
    def fewer_bits(self) -> dict[str, str]:
        """Which keys hold something that is used in fewer bits, and the form."""
        forms = {"quantize": self.quantize, "t5_quantize": self.t5_quantize if self.t5 else "none"}
        return {name: form for name, form in forms.items() if form != "none"}

    @model_validator(mode="after")
    def _shape_of_a_new_one(self) -> ModelConfig:
        if self.transformer is not None and self.init == "pretrained":
            raise ValueError(
                "transformer gives the shape of new weights, and init is pretrained; set init: random, or leave it out"
            )
        return self

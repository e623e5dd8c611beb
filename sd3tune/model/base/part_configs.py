"""The configurations of a base's parts, within the limits of Stable Diffusion 3 models.

They come from files of strangers, and the libraries would build a model of any size. So each configuration is checked
before a model is built: types, ranges wide enough for several times larger models, and values that must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from sd3tune.errors import ModelError
from sd3tune.model.base.contract import WAY_OUT, Part, check_part

_Count = Annotated[int, Field(ge=1, le=256)]
"""Type of a number of blocks, heads or latent channels."""
_Width = Annotated[int, Field(ge=1, le=65_536)]
_Side = Annotated[int, Field(ge=1, le=16_384)]
_Tokens = Annotated[int, Field(ge=1, le=1_000_000)]
_TokenId = Annotated[int, Field(ge=-1, le=1_000_000)]
_Number = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_MOST_WIDTH = 16_384
"""Limit on the width of the transformer: heads times their width."""


class _Transformer(Part):
    num_layers: _Count
    num_attention_heads: _Count
    attention_head_dim: int = Field(ge=1, le=1024)
    in_channels: _Count
    out_channels: _Count
    joint_attention_dim: _Width
    caption_projection_dim: _Width
    pooled_projection_dim: _Width
    pos_embed_max_size: int = Field(ge=1, le=1024)
    sample_size: _Side = 128
    patch_size: Literal[2] = 2
    dual_attention_layers: list[Annotated[int, Field(ge=0, le=255)]] = Field([], max_length=256)
    qk_norm: Literal["rms_norm"] | None = None


class _Vae(Part):
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: _Count
    block_out_channels: list[Annotated[int, Field(ge=1, le=8192)]] = Field(min_length=4, max_length=4)
    down_block_types: list[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]] = Field(min_length=4, max_length=4)
    up_block_types: list[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]] = Field(min_length=4, max_length=4)
    layers_per_block: int = Field(1, ge=1, le=16)
    norm_num_groups: int = Field(32, ge=1, le=1024)
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    sample_size: _Side = 32
    scaling_factor: float = Field(gt=0, le=1e4, allow_inf_nan=False)
    shift_factor: _Number
    latents_mean: list[_Number] | None = Field(None, max_length=256)
    latents_std: list[_Number] | None = Field(None, max_length=256)
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class _TextEncoder(Part):
    """Keys that the transformers library has for every model."""

    vocab_size: _Tokens
    num_labels: int | None = Field(None, ge=0, le=1000)  # the library makes a list of this length
    chunk_size_feed_forward: int | None = Field(None, ge=0, le=65_536)
    dtype: Literal["float32", "float16", "bfloat16", "auto"] | None = None
    torch_dtype: Literal["float32", "float16", "bfloat16", "auto"] | None = None
    pad_token_id: _TokenId | None = None
    bos_token_id: _TokenId | None = None
    eos_token_id: _TokenId | None = None
    initializer_factor: _Number | None = None


class _Clip(_TextEncoder):
    hidden_size: _Width
    intermediate_size: int = Field(2048, ge=1, le=262_144)
    projection_dim: _Width
    num_hidden_layers: _Count = 12
    num_attention_heads: _Count = 8
    max_position_embeddings: int = Field(77, ge=77, le=4096)
    hidden_act: str = Field("quick_gelu", max_length=40)
    layer_norm_eps: _Share = 1e-5
    attention_dropout: _Share = 0.0
    initializer_range: _Share = 0.02


class _T5(_TextEncoder):
    d_model: _Width
    d_kv: int = Field(64, ge=1, le=1024)
    d_ff: int = Field(2048, ge=1, le=262_144)
    num_layers: _Count = 6
    num_decoder_layers: _Count | None = None
    num_heads: _Count = 8
    relative_attention_num_buckets: int = Field(32, ge=4, le=4096)
    relative_attention_max_distance: int = Field(128, ge=1, le=65_536)
    dropout_rate: _Share = 0.1
    layer_norm_epsilon: _Share = 1e-6
    feed_forward_proj: str = Field("relu", max_length=40)
    is_gated_act: bool | None = None
    use_cache: bool | None = None
    tie_word_embeddings: bool | None = None


class _Scheduler(Part):
    num_train_timesteps: Literal[1000] = 1000
    shift: float = Field(1.0, gt=0, le=1000, allow_inf_nan=False)
    use_dynamic_shifting: bool = False
    base_shift: _Number | None = 0.5
    max_shift: _Number | None = 1.15
    base_image_seq_len: _Tokens = 256
    max_image_seq_len: _Tokens = 4096
    invert_sigmas: Literal[False] = False
    shift_terminal: _Share | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False


PARTS: Mapping[str, type[Part]] = {
    "transformer": _Transformer,
    "vae": _Vae,
    "text_encoder": _Clip,
    "text_encoder_2": _Clip,
    "text_encoder_3": _T5,
    "scheduler": _Scheduler,
}


def check_config(where: str, part: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError, with a line for each key, for a configuration that no Stable Diffusion 3 model can have.

    `where` begins the lines; `part` is a key of PARTS.
    """
    check_part(where, config, PARTS[part], ModelError)
    problems = list(_disagreements(part, config))
    if problems:
        raise ModelError(*(f"{where}: {problem}{WAY_OUT}" for problem in problems))


def _disagreements(part: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each value that is within its limits but contradicts another key."""
    if part == "transformer":
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if width > _MOST_WIDTH or width % 4:
            yield f"num_attention_heads: times attention_head_dim is {width}, not a multiple of 4 up to {_MOST_WIDTH}"
        if config["caption_projection_dim"] != width:
            yield f"caption_projection_dim: is {config['caption_projection_dim']}, not the width {width}"
        if config["out_channels"] != config["in_channels"]:
            yield f"out_channels: is {config['out_channels']}, not in_channels, {config['in_channels']}"
        beyond = [block for block in config.get("dual_attention_layers", ()) if block >= config["num_layers"]]
        if beyond:
            yield f"dual_attention_layers: there is no block {beyond[0]}"
    elif part == "vae":
        groups = config.get("norm_num_groups", 32)
        odd = [channels for channels in config["block_out_channels"] if channels % groups]
        if odd:
            yield f"norm_num_groups: {groups} does not divide {odd[0]} channels"
    elif part in ("text_encoder", "text_encoder_2"):
        heads = config.get("num_attention_heads", 8)
        if config["hidden_size"] % heads:
            yield f"num_attention_heads: {heads} does not divide hidden_size, {config['hidden_size']}"
    elif part == "scheduler":
        kinds = [key for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if config.get(key)]
        if len(kinds) > 1:
            yield f"{kinds[1]}: not with {kinds[0]}"

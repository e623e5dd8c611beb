"""The contents of a single safetensors file, from its header: an SD3 checkpoint in the original layout, or an encoder.

Configurations follow from the shapes. If the shape is a released model's, the bundled `configs/` complete it. Values
that shapes cannot show (activations, scaling factors) are the same in all released models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.errors import ModelError
from sd3tune.model.base.parts import COMMON, CONFIGS, ENCODER_PARTS, LABELS, VARIANTS
from sd3tune.model.base.weights import PICKLED, is_identity, read_json, tensor_headers

_NO_SHAPE = ("_class_name", "sample_size")

Headers = Mapping[str, dict[str, Any]]
"""See `weights.tensor_headers`."""
Shapes = Mapping[str, list[int]]
"""Tensor name without the part's prefix -> shape."""

_INSIDE = {"clip_l": "text_encoders.clip_l.", "clip_g": "text_encoders.clip_g.", "t5": "text_encoders.t5xxl."}
_QUANTISATION = re.compile(r"(.+\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|comfy_quant)")
_KINDS = (  # the order matters: the keys of a LoRA name modules of its base
    (r"(^|\.)lora_|\.hada_w|\.lokr_w", "a LoRA"),
    (r"double_blocks\.", "a Flux model"),
    (r"conditioner\.embedders\.1\.|label_emb\.", "a Stable Diffusion XL model"),
    (r"input_blocks\.", "a Stable Diffusion 1 or 2 model"),
    (r"joint_blocks\.", "a Stable Diffusion 3 transformer"),
    (r"transformer_blocks\.0\.", "one part of a model in diffusers' layout (give the folder with model_index.json)"),
    (r"text_model\.", "a CLIP text encoder"),
    (r"encoder\.block\.", "a T5 text encoder"),
    (r"(en|de)coder\.(down|up|mid|conv)", "a VAE"),
)


@dataclass(frozen=True)
class FilePart:
    """The weights of one part of a model inside a safetensors file: the tensors that begin with `prefix`."""

    file: Path
    prefix: str
    config: Mapping[str, Any]
    """The content of diffusers' or transformers' `config.json`."""
    unused: frozenset[str] = frozenset()
    """Tensors in the file, by name without the prefix, that Stable Diffusion 3 does not use."""


@dataclass(frozen=True)
class Checkpoint:
    """A base in one file."""

    variant: str | None
    """The key of VARIANTS whose transformer has exactly this shape; None for any other shape."""
    parts: Mapping[str, FilePart]
    """`transformer`, `vae`, and any of `clip_l`, `clip_g` and `t5` that the file contains."""


def check_format(file: Path) -> None:
    """Raise ModelError unless the file exists and has the ending of a safetensors file."""
    if file.suffix.lower() in PICKLED:
        raise ModelError(f"{file}: pickled weights are refused, as they can run any code; get the .safetensors file")
    if not file.is_file():
        raise ModelError(f"{file}: no such file")
    if file.suffix.lower() != ".safetensors":
        raise ModelError(f"{file}: not a .safetensors file, the only format that weights are read from")


def read_checkpoint(file: Path) -> Checkpoint:
    """Return the parts of an SD3 or SD3.5 checkpoint. No tensor is read.

    Raises ModelError for another architecture, an incomplete or a truncated file.
    """
    check_format(file)
    names = tensor_headers(file)
    prefix = _prefix(names, ("model.diffusion_model.", ""), "joint_blocks.0.x_block.attn.qkv.weight")
    if prefix is None:
        raise ModelError(f"{file}: {_kind(names)}, not a Stable Diffusion 3 or 3.5 checkpoint")
    vae = _prefix(names, ("first_stage_model.", "vae."), "decoder.conv_in.weight")
    if vae is None:
        raise ModelError(
            f"{file}: a Stable Diffusion 3 transformer without a VAE (no first_stage_model.decoder.conv_in.weight); "
            "get the whole checkpoint, such as sd3.5_medium.safetensors"
        )
    derived = _derive(file, names, prefix, mmdit_config)
    bundled = {variant: _bundled(CONFIGS / variant / "transformer") for variant in VARIANTS}
    variant = next((name for name, config in bundled.items() if derived.items() <= config.items()), None)
    config = bundled[variant or "sd3-medium"] | derived
    parts = {
        "transformer": FilePart(file, prefix, config),
        "vae": FilePart(file, vae, _bundled(COMMON / "vae") | _derive(file, names, vae, vae_config)),
    }
    for encoder, inside in _INSIDE.items():
        if any(name.startswith(inside) for name in names):
            parts[encoder] = _encoder(file, names, encoder, f"{inside}transformer.")
    return Checkpoint(variant, parts)


def released_shape(config: Mapping[str, Any]) -> str | None:
    """Return the key of VARIANTS whose transformer has the shape that `config` describes; None for any other shape.

    Keys are those of SD3Transformer2DModel's `config.json`; older files omit keys that are null or empty.
    """

    def shape(settings: Mapping[str, Any]) -> str:
        return json.dumps({key: settings.get(key) or None for key in released if key not in _NO_SHAPE})

    for variant in VARIANTS:
        released = _bundled(CONFIGS / variant / "transformer")
        if shape(config) == shape(released):
            return variant
    return None


def read_encoder(file: Path, encoder: str) -> FilePart:
    """Return a text encoder's file after checking its kind (CLIP or T5). No tensor is read.

    Raises ModelError for anything else, and for an incomplete or a truncated file.
    """
    check_format(file)
    return _encoder(file, tensor_headers(file), encoder, "")


def _encoder(file: Path, names: Headers, encoder: str, prefix: str) -> FilePart:
    mark = f"{prefix}{'encoder.block.0.' if encoder == 't5' else 'text_model.encoder.layers.0.'}"
    if not any(name.startswith(mark) for name in names):
        raise ModelError(f"{file}: {_kind(names)}, and model.text_encoders.{encoder} expects {LABELS[encoder]}")
    derive = {"clip_l": clip_l_config, "clip_g": clip_g_config, "t5": t5_config}[encoder]
    config = _bundled(COMMON / ENCODER_PARTS[encoder][1]) | _derive(file, names, prefix, derive)
    return FilePart(file, prefix, config, _unused(file, names, prefix) if encoder == "clip_l" else frozenset())


def misfits(encoders: Mapping[str, FilePart], transformer: Mapping[str, Any]) -> list[str]:
    """Return a line for each encoder whose width does not fit the transformer's config."""
    released = {name: _width(_bundled(COMMON / folder)) for name, (_, folder) in ENCODER_PARTS.items()}
    pooled = transformer["pooled_projection_dim"]
    expected = dict(released) if pooled == released["clip_l"] + released["clip_g"] else {}
    expected["t5"] = transformer["joint_attention_dim"]
    lines = []
    for name, part in encoders.items():
        width = _width(part.config)
        if width != expected.get(name, width):
            is_other = next((f" ({LABELS[other]}'s)" for other, usual in released.items() if usual == width), "")
            lines.append(
                f"{part.file}: its width is {width}{is_other}, and model.text_encoders.{name} expects {LABELS[name]} "
                f"of width {expected[name]}"
            )
    if lines or not {"clip_l", "clip_g"} <= set(encoders):
        return lines
    clip_l, clip_g = encoders["clip_l"], encoders["clip_g"]
    if clip_l.config["projection_dim"] + clip_g.config["projection_dim"] != pooled:
        return [
            f"{clip_l.file}, {clip_g.file}: pooled vectors of {clip_l.config['projection_dim']} and "
            f"{clip_g.config['projection_dim']}, and this base expects {pooled} together: see model.text_encoders"
        ]
    if _width(clip_l.config) > _width(clip_g.config):
        return [
            f"{clip_l.file}, {clip_g.file}: CLIP-L is the narrower one: swap clip_l and clip_g in model.text_encoders"
        ]
    return []


def is_quantisation(name: str) -> bool:
    """Return True if a tensor only describes how others are stored, such as a scale of fp8 weights."""
    return _QUANTISATION.fullmatch(name) is not None


def mmdit_config(shapes: Shapes) -> dict[str, Any]:
    """Return SD3Transformer2DModel's config. Heads are 64 wide unless QK-norm shows their width.

    Raises KeyError with the name of a missing tensor, ValueError for one that the architecture does not have.
    """
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = _count(shapes, "joint_blocks")
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    dual = [block for block in range(depth) if f"joint_blocks.{block}.x_block.attn2.qkv.weight" in shapes]
    expected = _mmdit_names(depth, dual, norm is not None)
    missing, unknown = sorted(expected - set(shapes)), sorted(set(shapes) - expected)
    if missing:
        raise KeyError(missing[0])
    if unknown:
        raise ValueError(f"{unknown[0]} is no tensor of Stable Diffusion 3" + f" (and {len(unknown) - 1} more)")
    return {
        "num_layers": depth,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "attention_head_dim": norm[0] if norm else 64,
        "num_attention_heads": width // (norm[0] if norm else 64),
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if norm else None,
    }


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Return AutoencoderKL's config. Normalisation has 32 groups, or fewer if a group would be a single channel."""
    blocks = range(_count(shapes, "encoder.down"))
    widths = [shapes[f"encoder.down.{block}.block.0.conv1.weight"][0] for block in blocks]
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": _count(shapes, "encoder.down.0.block"),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": min(32, widths[0] // 2),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip_g_config(shapes: Shapes) -> dict[str, Any]:
    """Return CLIPTextModelWithProjection's config. Heads are 64 wide, or 8 if 64 does not divide the width."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "projection_dim": shapes["text_projection.weight"][0],
        "num_hidden_layers": _count(shapes, "text_model.encoder.layers"),
        "num_attention_heads": width // (8 if width % 64 else 64),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
    }


def clip_l_config(shapes: Shapes) -> dict[str, Any]:
    """Return `clip_g_config` with the identity as projection: SD3 uses CLIP-L's unprojected pooled vector."""
    width = shapes["text_model.embeddings.token_embedding.weight"][1]
    return clip_g_config({**shapes, "text_projection.weight": [width, width]})


def t5_config(shapes: Shapes) -> dict[str, Any]:
    """Return T5EncoderModel's config (version 1.1, gated)."""
    attention, dense = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    vocabulary, width = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{attention}.q.weight"][0] // heads,
        "d_ff": shapes[f"{dense}.wi_0.weight"][0],
        "num_layers": _count(shapes, "encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _mmdit_names(depth: int, dual: list[int], qk_norm: bool) -> set[str]:
    """Return all tensor names of the original layout. The last block has no output for its text stream."""
    names = {"pos_embed"}
    layers = ["x_embedder.proj", "context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    layers += [f"{embedder}.mlp.{layer}" for embedder in ("t_embedder", "y_embedder") for layer in (0, 2)]
    for block in range(depth):
        for stream, attentions in (
            ("x_block", ("attn", "attn2") if block in dual else ("attn",)),
            ("context_block", ("attn",)),
        ):
            path = f"joint_blocks.{block}.{stream}"
            layers += [f"{path}.adaLN_modulation.1", *(f"{path}.{attention}.qkv" for attention in attentions)]
            if qk_norm:
                names |= {f"{path}.{attention}.ln_{name}.weight" for attention in attentions for name in "qk"}
            if block < depth - 1 or stream == "x_block":
                layers += [
                    *(f"{path}.{attention}.proj" for attention in attentions),
                    f"{path}.mlp.fc1",
                    f"{path}.mlp.fc2",
                ]
    return names | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def _derive(file: Path, names: Headers, prefix: str, derive: Callable[[Shapes], dict[str, Any]]) -> dict[str, Any]:
    shapes = {
        name.removeprefix(prefix): tensor["shape"]
        for name, tensor in names.items()
        if name.startswith(prefix) and not is_quantisation(name)
    }
    try:
        return derive(shapes)
    except KeyError as error:
        raise ModelError(f"{file}: incomplete: it lacks {prefix}{error.args[0]}; get the file again") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"{file}: not a plain Stable Diffusion 3 checkpoint: {error}") from None


def _unused(file: Path, names: Headers, prefix: str) -> frozenset[str]:
    """Return the tensors of CLIP-L's projection unless it is the identity; diffusers' loader ignores it as well."""
    projection = {name for name in names if name.startswith(f"{prefix}text_projection.")}
    weight = f"{prefix}text_projection.weight"
    if not projection or (projection == {weight} and is_identity(file, names[weight])):
        return frozenset()
    return frozenset(name.removeprefix(prefix) for name in projection)


def _prefix(names: Headers, prefixes: tuple[str, ...], tensor: str) -> str | None:
    return next((prefix for prefix in prefixes if prefix + tensor in names), None)


def _count(shapes: Shapes, container: str) -> int:
    """Return the number of distinct indices in a container, from 0 without gaps in a complete file."""
    numbers = re.compile(rf"{re.escape(container)}\.(\d+)\.")
    return len({found[1] for name in shapes if (found := numbers.match(name))})


def _width(config: Mapping[str, Any]) -> int:
    width: int = config["d_model"] if "d_model" in config else config["hidden_size"]
    return width


def _bundled(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def _kind(names: Headers) -> str:
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in names):
            return kind
    return f"something unknown ({len(names)} tensors, first {next(iter(names), 'none')})"

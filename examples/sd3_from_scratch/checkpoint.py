"""6. Files become models: a diffusers folder, or the transformer and VAE of Stability's own single file.

A file of weights is a list of names and arrays. Ours differ from others' in names, and in that queries, keys and values
are one matrix: one table per part says how.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from examples.sd3_from_scratch.mmdit import MMDiT
from examples.sd3_from_scratch.text import ClipText, T5Text
from examples.sd3_from_scratch.vae import Vae

Table = list[tuple[str, str]]
"""Regular expression -> replacement, one after the other. `qkv.0`, `.1`, `.2` are joined to `qkv` at the end."""

CLIP: Table = [
    (r"^text_model\.embeddings\.(token|position)_embedding", r"\1s"),
    (r"^text_model\.(encoder\.)?", ""),
    (r"layer_norm(\d)", r"norm\1"),
    (r"self_attn\.q_proj", "qkv.0"), (r"self_attn\.k_proj", "qkv.1"), (r"self_attn\.v_proj", "qkv.2"),
    (r"self_attn\.out_proj", "out"), (r"mlp\.fc1", "up"), (r"mlp\.fc2", "down"),
    (r"^final_layer_norm", "norm"), (r"^text_projection", "projection"),
]  # fmt: skip
T5: Table = [
    (r"^shared", "tokens"), (r"^encoder\.block\.0\..*relative_attention_bias", "distances"),
    (r"^encoder\.block", "layers"), (r"layer\.(\d)\.layer_norm", lambda m: f"norm{int(m[1]) + 1}"),
    (r"layer\.0\.SelfAttention\.q", "qkv.0"), (r"layer\.0\.SelfAttention\.k", "qkv.1"),
    (r"layer\.0\.SelfAttention\.v", "qkv.2"), (r"layer\.0\.SelfAttention\.o", "out"),
    (r"layer\.1\.DenseReluDense\.wi_0", "gate"), (r"layer\.1\.DenseReluDense\.wi_1", "up"),
    (r"layer\.1\.DenseReluDense\.wo", "down"), (r"^encoder\.final_layer_norm", "norm"),
]  # fmt: skip
VAE: Table = [
    (r"(down|up)_blocks", "stages"), (r"resnets", "blocks"), (r"(down|up)samplers\.0", "resize"),
    (r"mid_block\.blocks\.0", "middle.0"), (r"mid_block\.blocks\.1", "middle.2"),
    (r"mid_block\.attentions\.0\.", "middle.1."), (r"group_norm", "norm"), (r"conv_norm_out", "norm_out"),
    (r"to_q", "qkv.0"), (r"to_k", "qkv.1"), (r"to_v", "qkv.2"), (r"to_out\.0", "out"), (r"conv_shortcut", "shortcut"),
]  # fmt: skip
MMDIT: Table = [
    (r"^pos_embed\.proj", "patches"), (r"^pos_embed\.pos_embed", "positions"), (r"^context_embedder", "text"),
    (r"^time_text_embed\.timestep_embedder", "time"), (r"^time_text_embed\.text_embedder", "pooled"),
    (r"^(time|pooled)\.linear_1", r"\1.0"), (r"^(time|pooled)\.linear_2", r"\1.2"),
    (r"^norm_out\.linear", "modulation"), (r"^proj_out", "out"), (r"^transformer_blocks", "blocks"),
    (r"norm1\.linear", "image.modulation"), (r"norm1_context\.linear", "text.modulation"),
    (r"attn\.add_q_proj", "text.attention.qkv.0"), (r"attn\.add_k_proj", "text.attention.qkv.1"),
    (r"attn\.add_v_proj", "text.attention.qkv.2"), (r"attn\.to_add_out", "text.attention.out"),
    (r"attn\.norm_added_", "text.attention.norm_"), (r"\battn\.", "image.attention."), (r"attn2\.", "image.second."),
    (r"to_q", "qkv.0"), (r"to_k", "qkv.1"), (r"to_v", "qkv.2"), (r"to_out\.0", "out"),
    (r"ff\.net\.0\.proj", "image.up"), (r"ff\.net\.2", "image.down"),
    (r"ff_context\.net\.0\.proj", "text.up"), (r"ff_context\.net\.2", "text.down"),
]  # fmt: skip
SINGLE_MMDIT: Table = [
    (r"^x_embedder\.proj", "patches"), (r"^pos_embed", "positions"), (r"^context_embedder", "text"),
    (r"^t_embedder\.mlp", "time"), (r"^y_embedder\.mlp", "pooled"), (r"^joint_blocks", "blocks"),
    (r"x_block", "image"), (r"context_block", "text"), (r"adaLN_modulation\.1", "modulation"),
    (r"attn\.", "attention."), (r"attn2\.", "second."), (r"ln_", "norm_"), (r"\.proj\.", ".out."),
    (r"mlp\.fc1", "up"), (r"mlp\.fc2", "down"), (r"^final_layer\.linear", "out"), (r"^final_layer\.", ""),
]  # fmt: skip
SINGLE_VAE: Table = [
    (r"decoder\.up\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}"), (r"\.(down|up)\.", ".stages."),
    (r"\.block\.", ".blocks."), (r"(down|up)sample", "resize"), (r"nin_shortcut", "shortcut"),
    (r"mid\.block_1", "middle.0"), (r"mid\.attn_1", "middle.1"), (r"mid\.block_2", "middle.2"), (r"proj_out", "out"),
    (r"(middle\.1)\.q\.", r"\1.qkv.0."), (r"(middle\.1)\.k\.", r"\1.qkv.1."), (r"(middle\.1)\.v\.", r"\1.qkv.2."),
]  # fmt: skip
SCALE_FIRST = re.compile(r"^norm_out\.linear|norm1_context\.linear")  # in diffusers, where there are no gates


def ours(name: str, table: Table) -> tuple[str, int]:
    """Return our name of an array, and which part of it this is."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    part = re.search(r"qkv\.([012])", name)
    return (name.replace(part[0], "qkv"), int(part[1])) if part else (name, 0)


def renamed(tensors: Mapping[str, Tensor], table: Table, width: int = 0) -> dict[str, Tensor]:
    """Return our names and arrays. `width`: the model's, to tell the modulations without gates from others."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if SCALE_FIRST.search(name) and len(tensor) == 2 * width:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        whole, part = ours(name, table)
        found.setdefault(whole, {})[part] = tensor
    return {
        whole: torch.cat([of[part] for part in sorted(of)]) if len(of) > 1 else of[0] for whole, of in found.items()
    }


def _filled(build: Callable, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Return a model with these weights; it is made without memory first. Fails for a missing or unknown name."""
    with torch.device("meta"):
        made = build(config)
    for name, own in made.state_dict().items():
        if name in tensors and tensors[name].numel() == own.numel():
            tensors[name] = tensors[name].to(dtype).reshape(own.shape)  # a convolution of one pixel is a matrix
    made.load_state_dict(tensors, assign=True)
    return made.to(torch.get_default_device()).eval().requires_grad_(False)


def read(files: list[Path], prefix: str = "") -> dict[str, Tensor]:
    """Return the arrays whose names begin with `prefix`, without it."""
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
            found |= {name[len(prefix) :]: opened.get_tensor(name) for name in names}
    return found


PARTS: dict[str, tuple[Callable[[dict[str, Any]], nn.Module], Table]] = {
    "text_encoder": (ClipText, CLIP), "text_encoder_2": (ClipText, CLIP), "text_encoder_3": (T5Text, T5),
    "vae": (Vae, VAE), "transformer": (MMDiT, MMDIT),
}  # fmt: skip


def load(folder: Path, part: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a part of a diffusers folder, such as "vae"."""
    build, table = PARTS[part]
    config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    whole = folder / part / ("model" if part.startswith("text") else "diffusion_pytorch_model")
    parts = sorted(whole.parent.glob(f"{whole.name}-*-of-*.safetensors"))  # of a model in several files
    tensors = read(parts or [whole.with_suffix(".safetensors")])
    tensors.pop("encoder.embed_tokens.weight", None)  # T5's embedding once more
    width = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    return _filled(build, config, renamed(tensors, table, width), dtype)


def load_single_file(file: Path, dtype: torch.dtype = torch.float32) -> tuple[MMDiT, Vae]:
    """Load the transformer and the VAE of a file such as sd3.5_medium.safetensors; the shapes tell the settings."""
    tensors, vae = read([file], "model.diffusion_model."), read([file], "first_stage_model.")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    places = tensors["pos_embed"].numel() // width
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("joint_blocks"))
    config = {
        "num_layers": blocks, "attention_head_dim": 64, "num_attention_heads": width // 64, "patch_size": patch,
        "in_channels": channels, "out_channels": channels, "sample_size": 128, "pos_embed_max_size": round(places**0.5),
        "pooled_projection_dim": tensors["y_embedder.mlp.0.weight"].shape[1],
        "joint_attention_dim": tensors["context_embedder.weight"].shape[1],
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in tensors else None,
        "dual_attention_layers": [n for n in range(blocks) if f"joint_blocks.{n}.x_block.attn2.qkv.weight" in tensors],
    }  # fmt: skip
    stages = range(1 + max(int(name.split(".")[2]) for name in vae if name.startswith("encoder.down")))
    vae_config = {
        "block_out_channels": [len(vae[f"encoder.down.{n}.block.0.conv1.weight"]) for n in stages],
        "layers_per_block": 1 + max(int(name.split(".")[4]) for name in vae if name.startswith("encoder.down.0.block")),
        "norm_num_groups": 32, "latent_channels": channels, "shift_factor": 0.0609, "scaling_factor": 1.5305,
    }  # fmt: skip
    transformer = _filled(MMDiT, config, renamed(tensors, SINGLE_MMDIT), dtype)
    return transformer, _filled(Vae, vae_config, renamed(vae, SINGLE_VAE), dtype)

"""The Hub repositories of the released models: every file by its name, and weights of which only the headers are there.

Certain, from listings of the repositories and of mirrors: the names of files and folders, the two shards of T5 in both
precisions and of SD3.5-large's transformer, the index of a variant (`model.safetensors.index.fp16.json`), and the sizes
of SD3 and of SD3.5-medium's transformer. From memory: the other sizes, and the keys that configurations have beyond the
bundled ones. Not certain: the dtypes. Here SD3's plain encoders are fp32, as in a mirror, and all else has 16 bits.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sd3tune.model.base.parts import COMMON, CONFIG_FILES, CONFIGS, MODEL_INDEX, has_weights

SIZES = {
    "sd3-medium": {"transformer": 4.17, "single": 4.34},
    "sd35-medium": {"transformer": 4.94, "single": 5.11},
    "sd35-large": {"transformer": 16.29, "single": 16.46},
}
"""Published sizes in GB (1e9 bytes), rounded: of all shards of the transformer, and of the single file."""
SINGLE_FILES = {"sd35-medium": "sd3.5_medium.safetensors", "sd35-large": "sd3.5_large.safetensors"}
"""In the root of the repository; SD3's is in another one."""

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
_TEXTS = {
    "tokenizer": ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"),
    "tokenizer_2": ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"),
    "tokenizer_3": ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"),
}
_ENCODER_FILES = {
    "clip_l.safetensors": ("text_encoder", torch.float16),
    "clip_g.safetensors": ("text_encoder_2", torch.float16),
    "t5xxl_fp16.safetensors": ("text_encoder_3", torch.float16),
    "t5xxl_fp8_e4m3fn.safetensors": ("text_encoder_3", torch.float8_e4m3fn),
}
_STAMP = {"_diffusers_version": "0.31.0.dev0", "_name_or_path": "a/path/of/its/author"}
_CLIP: dict[str, Any] = {
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
}
_EXTRA: dict[str, dict[str, Any]] = {
    "text_encoder": _CLIP,
    "text_encoder_2": _CLIP,
    "text_encoder_3": {
        "classifier_dropout": 0.0,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "num_decoder_layers": 24,
        "output_past": True,
        "use_cache": True,
        "torch_dtype": "float16",
        "transformers_version": "4.41.2",
    },
    "transformer": _STAMP,
    "vae": {**_STAMP, "latents_mean": None, "latents_std": None},
    "scheduler": _STAMP,
}
"""Keys of the published configurations that the bundled ones lack."""
_MODELS: dict[str, Any] = {
    "transformer": SD3Transformer2DModel.from_config,
    "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
    "text_encoder_3": lambda config: T5EncoderModel(T5Config.from_dict(config)),
}


def write_repository(variant: str, root: Path, original: Mapping[str, Tensor] | None = None) -> Path:
    """Write the repository of a released model, a key of `VARIANTS`. `original` is the content of its single file."""
    for part in CONFIG_FILES:
        folder = root / part
        folder.mkdir(parents=True)
        for name in _TEXTS.get(part, ()):
            (folder / name).write_text(f"{part}/{name}")
        if part not in _TEXTS:
            (folder / CONFIG_FILES[part]).write_text(json.dumps(published_config(variant, part), indent=2))
        if has_weights(part):
            _write_weights(variant, part, folder)
    (root / "model_index.json").write_text(json.dumps({**MODEL_INDEX, "_diffusers_version": "0.31.0.dev0"}))
    for other in (".gitattributes", "README.md", "LICENSE.md", "mmdit.png"):
        (root / other).write_text("not needed")
    if original is not None and variant in SINGLE_FILES:
        write_hollow(root / SINGLE_FILES[variant], original)
        (root / "text_encoders").mkdir()
        for name, (part, dtype) in _ENCODER_FILES.items():
            tensors = empty_model(variant, part).state_dict()  # T5's embedding is in its file under both of its names
            write_hollow(root / "text_encoders" / name, _as(tensors, dtype))
    return root


def published_config(variant: str, part: str) -> dict[str, Any]:
    """Return a part's configuration as it is published: keys that the bundled one lacks, and not its newer keys."""
    newer = {"mid_block_add_attention"}
    if variant != "sd35-medium":
        newer.add("dual_attention_layers")
    if variant == "sd3-medium":
        newer.add("qk_norm")
    return {key: value for key, value in {**_bundled(variant, part), **_EXTRA[part]}.items() if key not in newer}


@cache
def empty_model(variant: str, part: str) -> nn.Module:
    """Return a part at full size, on the meta device."""
    with torch.device("meta"):
        model: nn.Module = _MODELS[part](_bundled(variant, part))
    return model


def write_hollow(file: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write a safetensors file without the bytes of its tensors: a hole in the disk, so no room is taken."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)
    return file


def _write_weights(variant: str, part: str, folder: Path) -> None:
    """Write a part's weights, and the encoders' once more as the variant `fp16`."""
    tensors = empty_model(variant, part).state_dict()
    if part == "text_encoder_3":
        tensors = {name: tensor for name, tensor in tensors.items() if name != "encoder.embed_tokens.weight"}
    if not part.startswith("text_encoder"):
        of_the_release = torch.float16 if variant == "sd3-medium" else torch.bfloat16
        write_shards(folder, "diffusion_pytorch_model", "", _as(tensors, of_the_release), "10GB")
        return
    plain, largest = (torch.float32, "10GB") if variant == "sd3-medium" else (torch.float16, "5GB")
    write_shards(folder, "model", "", _as(tensors, plain), largest)
    write_shards(folder, "model", ".fp16", _as(tensors, torch.float16), "5GB")


def write_shards(folder: Path, stem: str, variant: str, tensors: Mapping[str, Tensor], largest: str) -> None:
    """Write one file or several with their index, as the libraries split and name them."""
    pattern = f"{stem}{variant}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=largest)
    for file, names in split.filename_to_tensors.items():
        write_hollow(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def _as(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _bundled(variant: str, part: str) -> dict[str, Any]:
    folder = CONFIGS / variant / part if part == "transformer" else COMMON / part
    config: dict[str, Any] = json.loads((folder / CONFIG_FILES[part]).read_text())
    return config

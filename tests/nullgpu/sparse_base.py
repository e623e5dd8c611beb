"""Bases of the released shapes in the Hub's layout, whose weights are zeros in sparse files: 16 GB take no disk.

The norms' weights are ones, as the fast path keeps less for the backward pass where none is zero.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sd3tune.model.base.parts import COMMON, CONFIGS

_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_TOKENIZERS = {"tokenizer": "clip_l", "tokenizer_2": "clip_g", "tokenizer_3": "t5"}
_CLASSES = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
}


def write_sparse_base(folder: Path, variant: str, dtype: torch.dtype, blocks: int | None = None) -> Path:
    """Write `sd3-medium`, `sd35-medium` or `sd35-large` with all weights in `dtype`: loading converts nothing then.

    The transformer has its first `blocks` blocks, by default all.
    """
    makers: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
        "transformer": SD3Transformer2DModel.from_config,
        "vae": AutoencoderKL.from_config,
        "text_encoder": lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
        "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
        "text_encoder_3": lambda config: T5EncoderModel(T5Config.from_dict(config)),
    }
    for part, make in makers.items():
        source = (CONFIGS / variant if part == "transformer" else COMMON) / part
        shutil.copytree(source, folder / part)
        config = json.loads((source / "config.json").read_text())
        if part == "transformer" and blocks is not None:
            dual = [number for number in config["dual_attention_layers"] if number < blocks]
            config |= {"num_layers": blocks, "dual_attention_layers": dual}
            (folder / part / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            model = make(config)
        library, _ = _CLASSES[part]
        stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        shapes.pop("encoder.embed_tokens.weight", None)  # T5's second name of `shared.weight`
        sharded = part == "text_encoder_3" or (part, variant) == ("transformer", "sd35-large")
        _write(folder / part, stem, shapes, dtype, shards=2 if sharded else 1)
    shutil.copytree(COMMON / "scheduler", folder / "scheduler")
    for part, name in _TOKENIZERS.items():
        shutil.copytree(CONFIGS.parent / "tokenizers" / name, folder / part)
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.31.0"} | _CLASSES
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _write(folder: Path, stem: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shards: int) -> None:
    """Write the tensors as one file, or as several with an index, under the Hub's names."""
    if shards == 1:
        _write_file(folder / f"{stem}.safetensors", shapes, dtype)
        return
    names = list(shapes)
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        held = {name: shapes[name] for name in names[number::shards]}
        _write_file(folder / file, held, dtype)
        weight_map.update(dict.fromkeys(held, file))
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_file(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
        for name, shape in shapes.items():
            if len(shape) == 1 and name.endswith("weight"):
                opened.seek(8 + len(text) + header[name]["data_offsets"][0])
                opened.write(torch.ones(shape, dtype=dtype).view(torch.uint8).numpy().tobytes())

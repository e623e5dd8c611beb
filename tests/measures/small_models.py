"""Small DINO, DINOv2, CLIP and SigLIP models with random weights, in folders as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_WORDS = ["a", "dog", "cat", "red", "blue", "photo", "of", "beach"]


def save_dinov2(folder: Path) -> Path:
    torch.manual_seed(1)
    sizes = {name: size for name, size in _SIZES.items() if name != "intermediate_size"}
    _spread(Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **sizes))).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    torch.manual_seed(2)
    config = ViTConfig(image_size=32, patch_size=16, **_SIZES)
    _spread(ViTModel(config, add_pooling_layer=False)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    torch.manual_seed(3)
    tokenizer = clip_tokenizer(folder)
    ends: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={
            **_SIZES,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "pad_token_id": tokenizer.pad_token_id,
            **ends,
        },
        vision_config={**_SIZES, "image_size": 32, "patch_size": 16},
        projection_dim=24,
    )
    _spread(CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    torch.manual_seed(4)
    tokenizer = clip_tokenizer(folder)
    config = SiglipConfig(
        text_config={**_SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**_SIZES, "image_size": 32, "patch_size": 16},
    )
    _spread(SiglipModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def _spread(model: Any) -> Any:
    """Scale the weights so that features differ clearly between inputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a tokenizer of letters, whose files are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted({letter for word in _WORDS for letter in word})
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder)

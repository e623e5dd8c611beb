"""The names of a base's parts, the files that hold them, and the released models."""

from __future__ import annotations

from pathlib import Path

ENCODERS = ("clip_l", "clip_g", "t5")
ENCODER_PARTS = {
    "clip_l": ("tokenizer", "text_encoder"),
    "clip_g": ("tokenizer_2", "text_encoder_2"),
    "t5": ("tokenizer_3", "text_encoder_3"),
}
CONFIG_FILES = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "text_encoder_3": "config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "tokenizer_3": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
TEXT_FILES = ("*.json", "*.txt", "*.model")
ENCODER_OF = {encoder_part: encoder for encoder, (_, encoder_part) in ENCODER_PARTS.items()}
LABELS = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}

INDEX_FILE = "model_index.json"
MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

CONFIGS = Path(__file__).parent / "configs"
COMMON = CONFIGS / "common"
VARIANTS = {
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
}
"""The released models by the name of their folder in `configs/`, and the Hub repositories they are in."""


def has_weights(part: str) -> bool:
    """Return True if a part has weights: all but tokenizers and the scheduler."""
    return CONFIG_FILES[part] == "config.json"


def is_modulation(name: str) -> bool:
    """Return True if a transformer's module or parameter is an adaLN linear, or a part of one."""
    return any(part.startswith("norm") for part in name.split(".")) and "linear" in name.split(".")

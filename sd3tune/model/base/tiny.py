"""The tiny offline bases: random-weight SD3 models in the full layout of a diffusers folder, a few MB each.

Their images are meaningless, but they run through the same code as the 8-billion-parameter base: three text encoders
and tokenizers, a VAE with 16 latent channels, and an MMDiT whose options mirror the real model's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from filelock import FileLock
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sd3tune.model.base.parts import MODEL_INDEX
from sd3tune.model.base.progress_bars import no_progress_bars

Shape = Literal["sd3", "sd35-medium", "sd35-large"]

_TOKENIZERS = Path(__file__).parent / "tokenizers"
_TRANSFORMERS: dict[Shape, dict[str, Any]] = {
    "sd3": {"num_layers": 4, "num_attention_heads": 4},
    "sd35-medium": {
        "num_layers": 4,
        "num_attention_heads": 4,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0, 1),
    },
    "sd35-large": {"num_layers": 6, "num_attention_heads": 6, "qk_norm": "rms_norm"},
}
_CLIP_WIDTHS = {"clip_l": 16, "clip_g": 32}  # the sum is below the joint width, so that zero-padding happens
_JOINT_WIDTH = 64
_LATENT_CHANNELS = 16


def build_tiny(shape: Shape, folder: Path) -> None:
    """Write the tiny base of that shape to `folder`, unless it exists already.

    Of several concurrent processes, one builds under a lock, in a temporary folder that is then renamed. The weights
    depend only on the shape and each parameter's name; the global random state does not change.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if (folder / "model_index.json").is_file():
            return
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _write(shape, temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(shape: Shape, folder: Path) -> None:
    models: dict[str, nn.Module]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        models = {
            "transformer": _transformer(shape),
            "vae": _vae(),
            "text_encoder": _clip("clip_l"),
            "text_encoder_2": _clip("clip_g"),
            "text_encoder_3": _t5(),
        }
    for part, model in models.items():
        _draw(model, f"{shape}/{part}")
        if part == "vae":
            _calibrate_vae(model)
        model.should_save_on_this_rank = lambda is_main_process: True  # type: ignore[assignment]  # on every machine
        with no_progress_bars():
            model.save_pretrained(folder / part, safe_serialization=True)  # type: ignore[operator]
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    for source, part in (("clip_l", "tokenizer"), ("clip_g", "tokenizer_2"), ("t5", "tokenizer_3")):
        shutil.copytree(_TOKENIZERS / source, folder / part)
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def _transformer(shape: Shape) -> SD3Transformer2DModel:
    heads = _TRANSFORMERS[shape]["num_attention_heads"]
    return SD3Transformer2DModel(
        sample_size=32,
        pos_embed_max_size=96,  # up to 1536 px per side
        attention_head_dim=16,
        caption_projection_dim=heads * 16,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        joint_attention_dim=_JOINT_WIDTH,
        pooled_projection_dim=sum(_CLIP_WIDTHS.values()),
        **_TRANSFORMERS[shape],
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(encoder: str) -> CLIPTextModelWithProjection:
    vocabulary = json.loads((_TOKENIZERS / encoder / "vocab.json").read_text(encoding="utf-8"))
    tokens = json.loads((_TOKENIZERS / encoder / "special_tokens_map.json").read_text(encoding="utf-8"))
    width = _CLIP_WIDTHS[encoder]
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=width // 8,
            max_position_embeddings=77,
            hidden_act="quick_gelu" if encoder == "clip_l" else "gelu",
            bos_token_id=vocabulary[tokens["bos_token"]],
            eos_token_id=vocabulary[tokens["eos_token"]],
            pad_token_id=vocabulary[tokens["pad_token"]],
        )
    )


def _t5() -> T5EncoderModel:
    pieces = json.loads((_TOKENIZERS / "t5" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return T5EncoderModel(
        T5Config(
            vocab_size=len(pieces),
            d_model=_JOINT_WIDTH,
            d_kv=16,
            d_ff=2 * _JOINT_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )


@torch.no_grad()
def _draw(model: nn.Module, name: str) -> None:
    """Draw every parameter from its own generator, so that neither library versions nor order change it.

    Unit gain (fan-in) keeps activations of order one: text and adapters then visibly move the output.
    """
    for key, parameter in model.named_parameters():
        seed = int.from_bytes(hashlib.blake2b(f"{name}/{key}".encode(), digest_size=7).digest(), "little")
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        if parameter.ndim > 1:
            embedding = "embedding" in key or "shared" in key or "relative_attention_bias" in key
            parameter.copy_(noise if embedding else noise / math.sqrt(parameter[0].numel()))
        elif key.endswith("bias"):
            parameter.copy_(0.05 * noise)
        else:
            parameter.copy_(1 + 0.05 * noise)


@torch.no_grad()
def _calibrate_vae(vae: nn.Module) -> None:
    """Scale the moments as in the real VAE: a posterior much narrower than the spread of the means."""
    moments: nn.Conv2d = vae.encoder.conv_out  # type: ignore[union-attr,assignment]
    assert moments.bias is not None
    moments.weight[_LATENT_CHANNELS:] *= 0.1
    moments.bias[_LATENT_CHANNELS:] -= 6.0

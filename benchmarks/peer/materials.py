"""Inputs for both sides: six photos, with a shared caption or their own, and the folder of a base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks.cells import small_transformer
from sd3tune.data.sources.metadata import JSONL, write_jsonl
from sd3tune.model.base.parts import COMMON
from sd3tune.model.base.progress_bars import no_progress_bars
from sd3tune.model.base.resolve import resolve_base

PHOTOS = 6
PHOTO_SIZE = (1024, 768)
CAPTION = "a photo of sks robot"
T5_LAYERS = 2
PLACES = ("on a beach", "in the snow", "under a tree", "at night", "on a red carpet", "beside a lake")


@dataclass(frozen=True)
class Materials:
    photos: Path
    """Folder with the photos only."""
    captioned: Path
    """Folder with the photos and a metadata file with a caption for each."""
    bases: dict[str, Path]


def make_materials(folder: Path, bases: list[str]) -> Materials:
    """Create the materials under `folder`, except for the tiny base, which has its own folder."""
    photos, captioned = folder / "photos", folder / "captioned"
    draw_photos(photos)
    shutil.copytree(photos, captioned)
    names = sorted(photo.name for photo in photos.iterdir())
    write_jsonl(captioned / JSONL, [(name, f"{CAPTION} {place}") for name, place in zip(names, PLACES, strict=True)])
    return Materials(photos, captioned, {name: BASES[name](folder / "bases" / name) for name in bases})


def draw_photos(folder: Path) -> None:
    """Write six JPEG files with soft shapes and grain, as large as photos in pixels and bytes."""
    folder.mkdir(parents=True)
    width, height = PHOTO_SIZE
    for number in range(PHOTOS):
        source = np.random.default_rng(number)
        shapes = Image.fromarray(source.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(PHOTO_SIZE)
        grain = source.normal(0, 6, (height, width, 1))
        pixels = np.clip(np.asarray(shapes, dtype=np.float64) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=92)


def _tiny(folder: Path) -> Path:
    return resolve_base("tiny").path


def _small(folder: Path) -> Path:
    """Write the transformer of the trainer's benchmark, text encoders of matching widths, and tiny's other parts.

    The small VAE is in the peer's favour: it encodes images at each step unless it caches latents.
    """
    tiny = resolve_base("tiny").path
    shutil.copytree(tiny, folder)
    transformer: SD3Transformer2DModel = small_transformer(torch.float32)
    parts = {"transformer": transformer, **text_encoders(tiny, transformer.config.joint_attention_dim)}
    for part, model in parts.items():
        shutil.rmtree(folder / part)
        with no_progress_bars():
            model.save_pretrained(folder / part, safe_serialization=True)
    return folder


def _real_encoders(folder: Path) -> Path:
    """Write `small` with full-size CLIP-L, CLIP-bigG and VAE, and two of T5-XXL's 24 layers.

    Vocabularies and tokenizers are tiny's. The whole T5 would not fit into the memory of a small machine.
    """
    _small(folder)
    parts: dict[str, Callable[[], Any]] = {
        "text_encoder": lambda: CLIPTextModelWithProjection(_released(CLIPTextConfig, folder, "text_encoder")),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(_released(CLIPTextConfig, folder, "text_encoder_2")),
        "text_encoder_3": lambda: T5EncoderModel(_released(T5Config, folder, "text_encoder_3", num_layers=T5_LAYERS)),
        "vae": lambda: AutoencoderKL.from_config(AutoencoderKL.load_config(COMMON / "vae")),
    }
    for part, build in parts.items():
        model = _drawn(build)
        shutil.rmtree(folder / part)
        with no_progress_bars():
            model.save_pretrained(folder / part, safe_serialization=True)
    return folder


def _released(kind: Any, folder: Path, part: str, **changes: Any) -> Any:
    """Return the released model's configuration, with the token ids and vocabulary of the existing part."""
    there = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    kept = {key: there[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id") if key in there}
    return kind.from_pretrained(COMMON / part, **kept, **changes)


def text_encoders(tiny: Path, width: int) -> dict[str, Any]:
    """Return text encoders of the real widths (`width` for T5), with tiny's depth and vocabularies."""
    return {
        "text_encoder": _clip(tiny / "text_encoder", width=768),
        "text_encoder_2": _clip(tiny / "text_encoder_2", width=1280),
        "text_encoder_3": _t5(tiny / "text_encoder_3", width=width),
    }


def _clip(folder: Path, width: int) -> Any:
    config = CLIPTextConfig.from_pretrained(
        folder, hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_attention_heads=width // 64
    )
    return _drawn(lambda: CLIPTextModelWithProjection(config))


def _t5(folder: Path, width: int) -> Any:
    config = T5Config.from_pretrained(folder, d_model=width, d_ff=width // 4, d_kv=64, num_heads=8)
    return _drawn(lambda: T5EncoderModel(config))


def _drawn(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


BASES: dict[str, Callable[[Path], Path]] = {"tiny": _tiny, "small": _small, "real-encoders": _real_encoders}

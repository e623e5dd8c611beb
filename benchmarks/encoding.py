"""sd3tune's encoding compared with the bare encoders: the same captions and images, one at a time, in turns."""

from __future__ import annotations

import gc
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torchvision.transforms import v2
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from sd3tune.config import Config
from sd3tune.model.base.resolve import resolve_base
from sd3tune.run.encoding import Encoded, encode
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.processes import ALONE

IMAGES, SIDE, T5_TOKENS = 16, 512, 77
ROUNDS = 6
TARGET = 0.95
TOLERANCE = 1e-4
"""Relative tolerance; in fp32, pixels are normalised in another order of operations, which changes the VAE's result."""
_ENCODERS = (
    ("clip_l", "tokenizer", "text_encoder", CLIPTokenizer, CLIPTextModelWithProjection, 77),
    ("clip_g", "tokenizer_2", "text_encoder_2", CLIPTokenizer, CLIPTextModelWithProjection, 77),
    ("t5", "tokenizer_3", "text_encoder_3", T5TokenizerFast, T5EncoderModel, T5_TOKENS),
)


def run_encoding(folder: Path, rounds: int = ROUNDS, images: int = IMAGES, side: int = SIDE) -> dict[str, Any]:
    """Return images with captions per second of both sides, with loading, encoding and, for sd3tune, the store.

    The number of rounds is even. Raises RuntimeError unless both encode an image and its caption equally.
    """
    photos = folder / "photos"
    captions = _write_photos(photos, images, side)
    config = _config(photos, folder / "store", side)
    base = resolve_base("tiny").path
    found: dict[str, list[float]] = {"bare": [], "sd3tune": []}
    encoded: list[Encoded] = []
    plain: list[dict[str, torch.Tensor]] = []

    def ours() -> None:
        shutil.rmtree(folder / "store", ignore_errors=True)
        started = time.perf_counter()
        encoded[:] = [encode(make_plan(config, torch.device("cpu"), resume=None), ALONE, lambda line: None)]
        found["sd3tune"].append(time.perf_counter() - started)

    def bare() -> None:
        started = time.perf_counter()
        plain[:] = encode_bare(base, photos, captions, side)
        found["bare"].append(time.perf_counter() - started)

    gc.collect()
    gc.freeze()  # as the command line does after its imports; sd3tune collects garbage after each component
    sides: list[Callable[[], None]] = [ours, bare]
    for number in range(1 + rounds):
        for of in sides if number % 2 else reversed(sides):
            of()
        if number == 0:
            _check_same(encoded[0], captions, plain)
    ratios = [b / o for b, o in zip(found["bare"][1:], found["sd3tune"][1:], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "images": images,
        "pixels": side,
        **{f"{name}_per_s": images / statistics.median(of[1:]) for name, of in found.items()},
        "ratio": {"median": median, "low": low, "high": high},
        "target": TARGET,
    }


@torch.no_grad()
def encode_bare(base: Path, photos: Path, captions: dict[str, str], side: int) -> list[dict[str, torch.Tensor]]:
    """Encode with the libraries alone. Return each encoder's outputs and the VAE's posterior, per image, in memory."""
    made: list[dict[str, torch.Tensor]] = [{} for _ in captions]
    for name, tokenizer_part, part, tokenizer_class, model_class, length in _ENCODERS:
        tokenizer = tokenizer_class.from_pretrained(base / tokenizer_part, local_files_only=True)
        model = model_class.from_pretrained(base / part, local_files_only=True)
        for entry, caption in zip(made, captions.values(), strict=True):
            ids = tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            output = model(ids.input_ids, output_hidden_states=True)
            entry[name] = output.last_hidden_state[0] if name == "t5" else output.hidden_states[-2][0]
    vae = AutoencoderKL.from_pretrained(base / "vae", local_files_only=True)
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])])
    for entry, file in zip(made, captions, strict=True):
        with Image.open(photos / file) as image:
            pixels = to_tensor(v2.functional.resize(image.convert("RGB"), [side, side], v2.InterpolationMode.LANCZOS))
        posterior = vae.encode(pixels[None]).latent_dist
        entry["mean"], entry["std"] = posterior.mean[0], posterior.std[0]
    return made


def _check_same(encoded: Encoded, captions: dict[str, str], plain: list[dict[str, torch.Tensor]]) -> None:
    ours = {example.name: example for example in encoded.examples}
    for file, expected in zip(captions, plain, strict=True):
        example = ours[file]
        stored = {name: encoded.store.get(key)["hidden"] for name, key in example.captions.items()}
        stored |= encoded.store.get(example.images[0])
        for name, tensor in expected.items():
            error = ((stored[name] - tensor).norm() / tensor.norm()).item()
            if not error <= TOLERANCE:
                raise RuntimeError(f"{file}: {name} differs by {error:g} from what the bare encoders make")


def _write_photos(folder: Path, count: int, side: int) -> dict[str, str]:
    """Write square JPEG files of twice the side with caption files. Return name -> caption."""
    folder.mkdir(parents=True)
    captions = {}
    for number in range(count):
        source = np.random.default_rng(number)
        shapes = Image.fromarray(source.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((2 * side, 2 * side))
        shapes.save(folder / f"{number:03}.jpg", quality=92)
        captions[f"{number:03}.jpg"] = f"a photo of thing number {number} on a table"
        (folder / f"{number:03}.txt").write_text(captions[f"{number:03}.jpg"], encoding="utf-8")
    return captions


def _config(photos: Path, store: Path, side: int) -> Config:
    return Config.model_validate(
        {
            "name": "encoding",
            "model": {"base": "tiny", "dtype": "fp32", "max_sequence_length": T5_TOKENS},
            "data": {
                "sources": [{"kind": "folder", "path": str(photos)}],
                "resolution": side,
                "buckets": False,
                "cache_dir": str(store),
            },
        }
    )

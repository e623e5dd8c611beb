"""`python -m benchmarks.latents [FOLDER] [--base BASE]`: how far latents encoded in bf16 are from those in fp32.

Encodes nano's shapes and the demo's pictures, or the photos of a folder, with the VAE in both precisions, and
decodes both in fp32. Prints two lines; writes nothing. A picture file rounds to 8 bits, which moves its levels by 0.25
on average: that is what the difference of the decoded pictures is compared with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sd3tune.commands.demo import PICTURES, SIDE
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_vae
from sd3tune.model.load.latents import encode_moments
from sd3tune.nano.world import plain_scenes, render

PHOTO_SIDE = 256
ROUNDING = 0.25
"""Mean distance of a level from the nearest whole number, uniformly distributed."""


def images(folder: Path | None) -> Iterator[Tensor]:
    """Yield pictures as [1, 3, H, W], fp32 in -1 to 1."""
    if folder is not None:
        found = [Image.open(path).resize((PHOTO_SIDE, PHOTO_SIDE)) for path in sorted(folder.glob("*.[jp][pn]g"))]
    else:
        found = [Image.open(path).resize((SIDE, SIDE)) for path in sorted(PICTURES.glob("*.png"))]
        found += [render(scene, seed) for seed, scene in enumerate(plain_scenes(held_out=False)[::20])]
    for image in found:
        data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        yield data.view(1, image.height, image.width, 3).permute(0, 3, 1, 2) / 127.5 - 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latents")
    parser.add_argument("folder", type=Path, nargs="?", help="photos, instead of nano's pictures")
    parser.add_argument("--base", default="nano", help="the base whose VAE is used")
    options = parser.parse_args(arguments)
    base = resolve_base(options.base)
    fp32, bf16 = (load_vae(base, dtype) for dtype in (torch.float32, torch.bfloat16))
    errors, levels = [], []
    with torch.no_grad():
        for image in images(options.folder):
            exact, rounded = (encode_moments(vae, image)[0].float() for vae in (fp32, bf16))
            errors.append(float((rounded - exact).norm() / exact.norm()))
            levels.append(float((fp32.decode(rounded).sample - fp32.decode(exact).sample).abs().mean() * 127.5))
    for title, values, unit in (
        ("latents", [100 * one for one in errors], "% of their norm"),
        ("decoded pictures", levels, f" levels of 255 (8-bit files round by {ROUNDING})"),
    ):
        print(f"bf16 moves {title} by {sum(values) / len(values):.2f}{unit}, at most {max(values):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

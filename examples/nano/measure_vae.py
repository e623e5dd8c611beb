"""Measure the loss of nano's VAE: PSNR, and the share of reconstructed pictures that the oracle reads right.

python -m examples.nano.measure_vae data/nano/parts/vae
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from examples.nano.pictures import random_picture
from examples.nano.scenes import styled_scene, subject_scene
from examples.nano.train_vae import psnr, reconstruct, stack
from sd3tune.nano.oracle import judge
from sd3tune.nano.world import TEXTURES, Scene, random_scene, render

_SEED = 10**6  # beyond the seeds of the training pictures


def scenes_by_kind(count: int) -> dict[str, list[Scene]]:
    """Return `count` scenes of each kind, with held-out combinations."""
    chance = random.Random(f"measured/{_SEED}")
    kinds: dict[str, list[Scene]] = {kind: [] for kind in ("one thing", "two things", *TEXTURES) if kind}
    while any(len(scenes) < count for scenes in kinds.values()):
        scene = random_scene(chance, held_out=True)
        kind = kinds[scene.thing.texture or ("two things" if scene.other else "one thing")]
        if len(kind) < count:
            kind.append(scene)
    more = {"subjects": subject_scene, "styles": styled_scene}
    return kinds | {kind: [draw(chance) for _ in range(count)] for kind, draw in more.items()}


def share_read_right(pictures: Tensor, scenes: Sequence[Scene]) -> float:
    """Return the share of uint8 pictures [N, 3, 64, 64] that show their scenes completely."""
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    return sum(judge(image, scene).right for image, scene in zip(images, scenes, strict=True)) / len(images)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.nano.measure_vae", description=__doc__)
    parser.add_argument("vae", type=Path, help="folder of an AutoencoderKL")
    parser.add_argument("--pictures", type=int, default=200, help="of each kind")
    options = parser.parse_args(arguments)

    vae = AutoencoderKL.from_pretrained(options.vae, torch_dtype=torch.float32).eval()
    print(f"{'':12} {'PSNR, dB':>10} {'read right':>12} {'after the VAE':>14}")
    for kind, scenes in scenes_by_kind(options.pictures).items():
        drawn = stack(np.stack([np.asarray(render(scene, _SEED + n)) for n, scene in enumerate(scenes)]))
        decoded = reconstruct(vae, drawn)
        before, after = share_read_right(drawn, scenes), share_read_right(decoded, scenes)
        print(f"{kind:12} {psnr(drawn, decoded):10.1f} {before:12.1%} {after:14.1%}")
    chance = random.Random(_SEED)
    others = stack(np.stack([random_picture(chance) for _ in range(options.pictures)]))
    print(f"{'others':12} {psnr(others, reconstruct(vae, others)):10.1f}")


if __name__ == "__main__":
    main()

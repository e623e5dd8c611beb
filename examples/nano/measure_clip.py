"""Validate nano's CLIP against the oracle: does similarity rank pictures as the oracle does?

python -m examples.nano.measure_clip sd3tune/assets/nano_clip

Groups of pictures stand for models of different quality. In a group, pictures of a subject are warped, blurred, noisy
or replaced by other shapes, by an amount that differs between groups. The oracle gives each group the share of pictures
that show the subject, and the CLIP its mean similarity to six other pictures of the subject.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from examples.nano.pictures import SIDE
from sd3tune.nano.tasks import Task, instances, share_right, subject_tasks
from sd3tune.nano.world import SHAPES, SUBJECTS, render

AMOUNTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
Damage = Callable[[Image.Image, float, int], Image.Image]


class Clip:
    """The model with its processor; features have unit length."""

    def __init__(self, folder: Path) -> None:
        self.model = CLIPModel.from_pretrained(folder).eval()
        self.processor = CLIPProcessor.from_pretrained(folder)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        features = self.model.get_image_features(**self.processor(images=list(pictures), return_tensors="pt"))
        return _unit(features)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.processor(text=list(prompts), padding=True, return_tensors="pt")
        return _unit(self.model.get_text_features(**tokens))


def _unit(features: object) -> Tensor:
    tensor = features if isinstance(features, Tensor) else features.pooler_output  # type: ignore[attr-defined]
    return tensor / tensor.norm(dim=-1, keepdim=True)


def warped(picture: Image.Image, amount: float, seed: int) -> Image.Image:
    """Return the picture moved smoothly, by some 8 pixels."""
    coarse = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(seed)) * 0.25 * amount
    shift = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic")[0].permute(1, 2, 0)
    here = F.affine_grid(torch.eye(2, 3)[None], [1, 3, SIDE, SIDE], align_corners=False)
    pixels = torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None]
    moved = F.grid_sample(pixels, here + shift, padding_mode="border", align_corners=False)
    return Image.fromarray(moved[0].permute(1, 2, 0).round().byte().numpy())


def blurred(picture: Image.Image, amount: float, seed: int) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(6 * amount))


def noisy(picture: Image.Image, amount: float, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 120 * amount, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.asarray(picture, np.float32) + noise, 0, 255).astype(np.uint8))


def groups_of(subject: str, count: int) -> list[tuple[list[Task], list[Image.Image]]]:
    """Return tasks and pictures of each group."""
    tasks = subject_tasks(count, 100, subject)
    drawn = [render(task.scene, task.seed) for task in tasks]
    groups = []
    for damage in (warped, blurred, noisy):
        for amount in AMOUNTS:
            groups.append((tasks, [damage(picture, amount, n) for n, picture in enumerate(drawn)]))
    chance = random.Random(subject)
    others = [*SHAPES, *(name for name in SUBJECTS if name != subject)]
    for amount in AMOUNTS:
        pictures = []
        for n, (task, picture) in enumerate(zip(tasks, drawn, strict=True)):
            thing = replace(task.scene.thing, shape=chance.choice(others))
            is_wrong = n < amount * count
            pictures.append(render(replace(task.scene, thing=thing), task.seed) if is_wrong else picture)
        groups.append((tasks, pictures))
    return groups


def similarity(clip: Clip, pictures: Sequence[Image.Image], photos: Sequence[Image.Image]) -> float:
    """Return the mean cosine similarity of pictures to photos, as a share: 1 for the photos among each other."""
    of_photos = clip.images(photos)
    among = of_photos @ of_photos.T
    ceiling = (among.sum() - among.diagonal().sum()) / (len(photos) * (len(photos) - 1))
    return float((clip.images(pictures) @ of_photos.T).mean() / ceiling)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.nano.measure_clip", description=__doc__)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--pictures", type=int, default=12, help="of each group")
    options = parser.parse_args(arguments)
    clip = Clip(options.clip)
    shares, of_images, of_texts = [], [], []
    for subject in SUBJECTS:
        photos = [render(scene, seed) for seed, scene in enumerate(instances(subject))]
        right, near, true = [], [], []
        for tasks, pictures in groups_of(subject, options.pictures):
            right.append(share_right(tasks, pictures))
            near.append(similarity(clip, pictures, photos))
            captions = clip.texts([task.scene.caption for task in tasks])
            true.append(float((clip.images(pictures) * captions).sum(-1).mean()))
        print(_row(subject, right, near, true), flush=True)
        shares, of_images, of_texts = shares + right, of_images + near, of_texts + true
    print(_row("all", shares, of_images, of_texts))


def _row(name: str, right: Sequence[float], near: Sequence[float], true: Sequence[float]) -> str:
    return f"{name:8} CLIP-I {rank_correlation(right, near):.2f}  CLIP-T {rank_correlation(right, true):.2f}"


if __name__ == "__main__":
    main()

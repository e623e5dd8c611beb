"""Measure a run: the held-out loss by noise level, and the accuracy of its images.

python -m examples.fashion_mnist.measure runs/fashion_mnist

The judge is independent of the run: the nearest real pictures, by pixels.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from examples.nano.pictures import pictures_in
from examples.nano.train_vae import psnr, reconstruct, stack
from sd3tune.config import load_config
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.sampling.sampler import SamplerSettings

SIDE = 28  # in pixels, of Fashion-MNIST's pictures
NEIGHBOURS = 5
DECODED = 200  # number of real pictures that are reconstructed by the VAE
_SEED = 1000  # previews use seeds from 0


def held_out_losses(run: Path) -> str:
    """Return a table of the first and last line of `validation.jsonl`."""
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    first, last = lines[0], lines[-1]
    rows = [f"| sigma | step {first['step']} | step {last['step']} |", "|---|---|---|"]
    for sigma, loss in first["loss_by_sigma"].items():
        rows.append(f"| {sigma} | {loss:.3f} | {last['loss_by_sigma'][sigma]:.3f} |")
    return "\n".join([*rows, f"| mean | {first['loss']:.3f} | {last['loss']:.3f} |"])


def labelled(parquet: Path) -> tuple[Tensor, list[str]]:
    """Return the grey values of all pictures, [N, 784] in [0, 1], and their captions."""
    table = pq.read_table(parquet, columns=["image", "text"])
    pictures = [Image.open(io.BytesIO(cell["bytes"])) for cell in table["image"].to_pylist()]
    return grey(pictures), table["text"].to_pylist()


def grey(pictures: Sequence[Image.Image]) -> Tensor:
    small = [picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS) for picture in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in small])).flatten(1).float() / 255


def read(pictures: Tensor, known: Tensor, captions: Sequence[str]) -> list[str]:
    """Return the commonest caption of the nearest known pictures for each picture [N, 784]; ties go to the nearest."""
    names = sorted(set(captions))
    labels = torch.tensor([names.index(caption) for caption in captions])
    answers = []
    for part in pictures.split(500):
        near = torch.cdist(part, known).topk(NEIGHBOURS, largest=False).indices
        votes = torch.nn.functional.one_hot(labels[near], len(names)).sum(1).float()
        votes.scatter_add_(1, labels[near[:, :1]], torch.full((len(part), 1), 0.5))
        answers += [names[number] for number in votes.argmax(1).tolist()]
    return answers


def share_right(answers: Sequence[str], captions: Sequence[str]) -> float:
    return sum(answer == caption for answer, caption in zip(answers, captions, strict=True)) / len(captions)


def as_pictures(pixels: Tensor) -> list[Image.Image]:
    """Convert uint8 [N, 3, H, W] to PIL images."""
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]


def drawn_by(pipeline: ImagePipeline, each: int, names: Sequence[str]) -> tuple[list[Image.Image], list[str]]:
    """Draw `each` pictures of each name. Return pictures and names."""
    prompts = [name for name in names for _ in range(each)]
    return pipeline.draw([(name, _SEED + number) for number, name in enumerate(prompts)]), prompts


def pipeline_of(run: Path) -> ImagePipeline:
    """Return a pipeline of the run's model, with the settings of its previews."""
    config = load_config(run / "config.yaml").config
    side = config.data.resolution
    settings = SamplerSettings(config.preview.steps, config.preview.guidance, side, side)
    return ImagePipeline(str(run / "model"), settings, t5_length=config.model.max_sequence_length)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.fashion_mnist.measure", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--each", type=int, default=20, help="pictures drawn of each kind")
    parser.add_argument("--data", type=Path, default=Path("data/fashion_mnist"), help="train.parquet and test.parquet")
    options = parser.parse_args(arguments)

    known, captions = labelled(options.data / "train.parquet")
    real, truth = labelled(options.data / "test.parquet")
    names = sorted(set(captions))
    pipeline = pipeline_of(options.run)
    original = stack(pictures_in(options.data / "test.parquet", DECODED))
    decoded = reconstruct(pipeline.vae, original)
    drawn, prompts = drawn_by(pipeline, options.each, names)

    def right(pictures: Tensor, expected: Sequence[str]) -> float:
        return share_right(read(pictures, known, captions), expected)

    print(held_out_losses(options.run))
    print(f"\nPSNR of {len(decoded)} test pictures after the VAE: {psnr(original, decoded):.1f} dB\n")
    print("| pictures | read right |\n|---|---|")
    print(f"| {len(truth)} real ones | {right(real, truth):.1%} |")
    print(f"| {len(decoded)} of them after the VAE | {right(grey(as_pictures(decoded)), truth[: len(decoded)]):.1%} |")
    print(f"| {len(prompts)} drawn ones | {right(grey(drawn), prompts):.1%} |")
    for start, name in zip(range(0, len(prompts), options.each), names, strict=True):
        rows = slice(start, start + options.each)
        print(f"| {name} | {right(grey(drawn[rows]), prompts[rows]):.0%} |")


if __name__ == "__main__":
    main()

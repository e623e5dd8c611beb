"""How a run did: the held-out loss by noise level, and whether what it draws is what it was asked for.

python -m examples.fashion_mnist.measure runs/fashion_mnist

The judge knows nothing of the run: it is the nearest real pictures, in pixels.
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

SIDE = 28  # of Fashion-MNIST's pictures
NEIGHBOURS = 5
DECODED = 200  # real pictures that go through the VAE
_SEED = 1000  # previews have those from 0 on


def held_out_losses(run: Path) -> str:
    """Return a table of `validation.jsonl`'s first and last line."""
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
    """What most of the nearest known pictures show, for each picture [N, 784]; of equally many, the nearest's."""
    names = sorted(set(captions))
    labels = torch.tensor([names.index(caption) for caption in captions])
    found = []
    for part in pictures.split(500):
        near = torch.cdist(part, known).topk(NEIGHBOURS, largest=False).indices
        votes = torch.nn.functional.one_hot(labels[near], len(names)).sum(1).float()
        votes.scatter_add_(1, labels[near[:, :1]], torch.full((len(part), 1), 0.5))
        found += [names[number] for number in votes.argmax(1).tolist()]
    return found


def share_right(found: Sequence[str], asked: Sequence[str]) -> float:
    return sum(one == other for one, other in zip(found, asked, strict=True)) / len(asked)


def as_pictures(pixels: Tensor) -> list[Image.Image]:
    """uint8 [N, 3, H, W] as PIL's."""
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]


def drawn_by(pipeline: ImagePipeline, each: int, names: Sequence[str]) -> tuple[list[Image.Image], list[str]]:
    """`each` pictures of each name, and the names."""
    asked = [name for name in names for _ in range(each)]
    return pipeline.draw([(name, _SEED + number) for number, name in enumerate(asked)]), asked


def pipeline_of(run: Path) -> ImagePipeline:
    """Return the run's result, drawing as its previews were drawn."""
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
    drawn, asked = drawn_by(pipeline, options.each, names)

    def right(pictures: Tensor, shown: Sequence[str]) -> float:
        return share_right(read(pictures, known, captions), shown)

    print(held_out_losses(options.run))
    print(f"\nPSNR of {len(decoded)} test pictures after the VAE: {psnr(original, decoded):.1f} dB\n")
    print("| pictures | read right |\n|---|---|")
    print(f"| {len(truth)} real ones | {right(real, truth):.1%} |")
    print(f"| {len(decoded)} of them after the VAE | {right(grey(as_pictures(decoded)), truth[: len(decoded)]):.1%} |")
    print(f"| {len(asked)} drawn ones | {right(grey(drawn), asked):.1%} |")
    for start, name in zip(range(0, len(asked), options.each), names, strict=True):
        of_it = slice(start, start + options.each)
        print(f"| {name} | {right(grey(drawn[of_it]), asked[of_it]):.0%} |")


if __name__ == "__main__":
    main()

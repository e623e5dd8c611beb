"""10. How far are drawn pictures from real ones? The Fréchet distance of their features.

    python -m examples.sd3_from_scratch.metrics REAL DRAWN

A small network turns a picture into a few numbers, its features. For two sets of pictures, take mean and covariance of
their features as those of two normal distributions; their distance is |m - n|^2 + tr(C + D - 2 (C D)^(1/2)).

Why it needs many images: a covariance of d features has d (d + 1) / 2 numbers. With few pictures its small eigenvalues
come out too small, so two sets of the same kind seem apart. Compare only sets of equal size.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.sd3_from_scratch.train import read_pictures


def root(matrix: Tensor) -> Tensor:
    """Return the square root of a symmetric matrix without negative eigenvalues: that of each eigenvalue."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(first: Tensor, second: Tensor) -> float:
    """Return the Fréchet distance of two sets of features, [n, d] and [m, d], in float64."""
    # (C D)^(1/2) is not symmetric, but has the trace of (C^(1/2) D C^(1/2))^(1/2), which is.
    (m, c), (n, d) = ((one.mean(0), torch.cov(one.T)) for one in (first.double(), second.double()))
    half = root(c)
    return ((m - n).square().sum() + c.trace() + d.trace() - 2 * root(half @ d @ half).trace()).item()


def trained_features(pixels: Tensor, labels: Tensor, steps: int = 1000) -> nn.Module:
    """Train a small network to tell classes [n] of pictures [n, c, h, w] apart; return it without its end."""
    layers = [nn.Conv2d(before, after, 3, 2, 1) for before, after in ((pixels.shape[1], 32), (32, 64), (64, 64))]
    features = nn.Sequential(*(nn.Sequential(one, nn.ReLU()) for one in layers), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(features, nn.Linear(64, int(labels.max()) + 1)).to(pixels.device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        chosen = torch.randint(len(pixels), (128,))
        F.cross_entropy(model(pixels[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return features.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", type=Path, help="pictures with captions, which are their classes")
    parser.add_argument("drawn", type=Path, help="as many pictures again")
    asked = parser.parse_args()
    (pixels, captions), (drawn, _) = read_pictures(asked.real), read_pictures(asked.drawn)
    names, half = sorted(set(captions)), len(captions) // 2
    torch.manual_seed(0)
    features = trained_features(pixels, torch.tensor([names.index(caption) for caption in captions]))
    near, far = features(pixels)[torch.randperm(len(pixels))[: 2 * half]].chunk(2)
    print(f"{half} real pictures and others: {frechet(near, far):.3f}")
    print(f"{half} real pictures and {len(drawn)} drawn ones: {frechet(near, features(drawn)):.3f}")


if __name__ == "__main__":
    main()

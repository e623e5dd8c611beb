"""Distances between two sets of pictures, on their features: FID and KID, by torchmetrics.

They are usually stated on features of Inception, and are then another number: compare only figures of one encoder.
"""

from __future__ import annotations

import importlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sd3tune.errors import MeasureUnavailable

FID_NEEDS = 10_000
"""Least number of pictures a side that the authors of FID recommend (README of github.com/bioinf-jku/TTUR)."""
KID_NEEDS = 1_000
"""Pictures in a subset by default in the code of KID's authors (github.com/mbinkowski/MMD-GAN, compute_scores.py)."""


@dataclass(frozen=True)
class Kid:
    """The mean and standard deviation of KID over random subsets."""

    mean: float
    std: float
    """Between subsets of `size`; the error of the mean is smaller."""
    subsets: int
    size: int
    """Pictures of either side in a subset."""


def fid(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance of two sets of features, [n, d] and [m, d], in float64.

    `|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))` with unbiased covariances (Heusel et al. 2017,
    arXiv:1706.08500). It is biased upwards for few pictures: compare equal n. Raises ValueError for fewer than two
    pictures, and MeasureUnavailable without torchmetrics.
    """
    _check(a, b, least=2)
    metric = _metric("fid", "FrechetInceptionDistance", a.shape[1]).set_dtype(torch.float64)
    return max(0.0, _computed(metric, a, b).item())


def kid(a: Tensor, b: Tensor, *, gamma: float = 1.0, subsets: int = 100, seed: int = 0) -> Kid:
    """Return the unbiased squared MMD of two sets of features, [n, d] and [m, d], in float64.

    The kernel is `(gamma x.y + 1)^3` (Bińkowski et al. 2018, arXiv:1801.01401). Their gamma is 1/d, for Inception's
    features; 1 suits features of unit length, whose kernel would otherwise be almost linear. A subset has at most
    `KID_NEEDS` pictures and half of the smaller side, so that subsets differ. A function of features and seed only.
    Raises ValueError for fewer than four pictures, and MeasureUnavailable without torchmetrics.
    """
    _check(a, b, least=4)
    size = min(KID_NEEDS, len(a) // 2, len(b) // 2)
    metric = _metric("kid", "KernelInceptionDistance", a.shape[1], subsets=subsets, subset_size=size, gamma=gamma)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = _computed(metric, a, b)
    return Kid(mean.item(), std.item(), subsets, size)


def too_few(count: int, features: int) -> str | None:
    """Return one line if `count` pictures a side are too few to trust FID or KID; `features` is the encoder's d."""
    if count >= FID_NEEDS:
        return None
    rank = f", and more than its {features} features" if count <= features else ""
    less = "FID compares only with figures of the same number of pictures"
    more = f"; KID's subsets are smaller than the usual {KID_NEEDS:,}" if count < 2 * KID_NEEDS else ""
    return f"{count:,} pictures a side: FID needs {FID_NEEDS:,}{rank}, so {less}{more}"


class _Features(nn.Module):
    """An extractor for torchmetrics that returns its input."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metric(module: str, name: str, features: int, **options: Any) -> Any:
    try:
        metrics = importlib.import_module(f"torchmetrics.image.{module}")
    except ImportError:
        raise MeasureUnavailable("FID and KID need torchmetrics: pip install 'sd3tune[eval]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that features are held in memory, where they are already
        return getattr(metrics, name)(feature=_Features(features), **options)


def _computed(metric: Any, a: Tensor, b: Tensor) -> Any:
    metric.update(a.detach().cpu().double(), real=True)
    metric.update(b.detach().cpu().double(), real=False)
    return metric.compute()


def _check(a: Tensor, b: Tensor, least: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {list(a.shape)} and {list(b.shape)} cannot be compared")
    if min(len(a), len(b)) < least:
        raise ValueError(f"{min(len(a), len(b))} pictures: at least {least} a side are needed")
    if not (math.isfinite(float(a.sum())) and math.isfinite(float(b.sum()))):
        raise ValueError("the features are not finite")

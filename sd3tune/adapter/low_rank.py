"""Sums and low-rank approximations of adapters, without forming products of the weight's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd3tune.adapter.contents import Pair
from sd3tune.errors import AdapterError


@dataclass(frozen=True)
class Truncated:
    """The best approximation B'A' of a product BA at a lower rank."""

    pair: Pair
    lost: float
    """|BA - B'A'|^2 (Frobenius)."""
    total: float
    """|BA|^2."""


def weighted_sum(adapters: Sequence[tuple[Mapping[str, Pair], float]]) -> dict[str, Pair]:
    """Return the exact sum of weight * BA over adapters, by concatenating their ranks.

    The factors' scale is folded into B. Raises AdapterError if the sizes of a module differ between adapters.
    """
    downs: dict[str, list[Tensor]] = {}
    ups: dict[str, list[Tensor]] = {}
    for factors, weight in adapters:
        for module, (down, up) in factors.items():
            downs.setdefault(module, []).append(down)
            ups.setdefault(module, []).append(weight * up)
    for module in downs:
        sizes = {(len(up), down.shape[1]) for down, up in zip(downs[module], ups[module], strict=True)}
        if len(sizes) > 1:
            several = " and ".join(f"{rows}x{columns}" for rows, columns in sorted(sizes))
            raise AdapterError(f"{module} is {several} in the adapters: they were made for different bases")
    return {module: (torch.cat(downs[module]), torch.cat(ups[module], dim=1)) for module in downs}


def truncate(pair: Pair, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Return the nearest pair of `rank`, or of the smallest rank (at least 1) that keeps the share `energy` of |BA|^2.

    The SVD is of the r x r matrix between the Q factors of B and A. Each factor gets the square root of the singular
    values.
    """
    down, up = (factor.double() for factor in pair)
    columns, right = torch.linalg.qr(down.T)
    rows, left = torch.linalg.qr(up)
    u, values, vh = torch.linalg.svd(left @ right.T)
    squares = values.square()
    total = squares.sum().item()
    if energy is not None:
        rank = 1 + int((squares.cumsum(0) < energy * total).sum())
    kept = min(rank or len(values), len(values))
    root = values[:kept].sqrt()
    shorter_up, shorter_down = rows @ u[:, :kept] * root, root[:, None] * (vh[:kept] @ columns.T)
    return Truncated((shorter_down.float(), shorter_up.float()), squares[kept:].sum().item(), total)


def approximated(change: Tensor, rank: int) -> Truncated:
    """Return the nearest product BA of `rank` to a matrix [out, in], on the matrix's device.

    A has the first eigenvectors of the smaller Gram matrix, in float64: 20 times as fast as the SVD. B A is the
    projection of the matrix onto them, so their rounding matters little.
    """
    matrix = change.double()
    is_wide = matrix.shape[1] > matrix.shape[0]
    tall = matrix.T if is_wide else matrix
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    kept = vectors[:, -min(rank, len(squares)) :].flip(1)
    projected = tall @ kept
    root = projected.norm(dim=0).sqrt()  # of each singular value
    scaled = projected / root.clamp(min=torch.finfo(torch.float64).tiny)
    wide, narrow = (kept * root, scaled.T) if is_wide else (scaled, (kept * root).T)
    total = tall.square().sum().item()
    lost = max(total - projected.square().sum().item(), 0.0)
    return Truncated((narrow.float().cpu().contiguous(), wide.float().cpu().contiguous()), lost, total)

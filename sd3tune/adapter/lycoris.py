"""LoHa and LoKr: the update of a layer as a product of small tensors, by LyCORIS' and PEFT's names of these.

LoHa (FedPara, Hyeon-Woo et al. 2022) is (w1_a w1_b) * (w2_a w2_b), elementwise, each product low-rank. LoKr (Yeh et al.
2024) is the Kronecker product of w1 [a, c] and w2 [b, d], for a layer of a b outputs and c d inputs; either may be a
product w_a w_b of low rank. Both are scaled by alpha / rank; a LoKr without a low rank is not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
"""Name, such as `hada_w1_a` or `lokr_w2` -> matrix."""

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def is_lycoris(parts: Mapping[str, object]) -> bool:
    """Return True if a module has parts of LoHa or LoKr."""
    return any(part.startswith(("hada_", "lokr_")) for part in parts)


def kind_of(parts: Mapping[str, object]) -> str:
    """Return `loha` or `lokr`."""
    return "loha" if any(part.startswith("hada_") for part in parts) else "lokr"


def lycoris_fault(parts: Parts) -> str | None:
    """Return the fault of a module's parts, or None."""
    matrices = {name: tensor for name, tensor in parts.items() if name in (*LOHA, *LOKR)}
    tucker = [name for name in parts if name.endswith(("_t1", "_t2"))]
    if tucker or any(tensor.ndim == 4 for tensor in matrices.values()):
        return f"{tucker[0] if tucker else next(iter(matrices))} adapts a convolution, which sd3tune does not read"
    if any(tensor.ndim != 2 or not tensor.numel() for tensor in matrices.values()):
        return "its parts are not matrices"
    pairs = ("hada_w1", "hada_w2") if kind_of(parts) == "loha" else ("lokr_w1", "lokr_w2")
    for pair in pairs:
        low = [f"{pair}_a" in matrices, f"{pair}_b" in matrices]
        if not (pair in matrices) ^ all(low) or (pair in matrices and any(low)):
            return f"{pair} is not complete"
        if all(low) and matrices[f"{pair}_a"].shape[1] != matrices[f"{pair}_b"].shape[0]:
            return f"{pair}_a and {pair}_b are not of one rank"
    if set(matrices) - set(LOHA if pairs[0] == "hada_w1" else LOKR):
        return "holds parts of LoHa and of LoKr"
    first, second = (_whole(matrices, pair).shape for pair in pairs)
    return "hada_w1 and hada_w2 are of different sizes" if pairs[0] == "hada_w1" and first != second else None


def rank_of(parts: Parts) -> int | None:
    """Return the rank by which alpha is divided; None for a LoKr of two whole matrices, which has no scale."""
    factors = ("hada_w1_b",) if kind_of(parts) == "loha" else ("lokr_w2_b", "lokr_w1_b")
    return next((len(parts[name]) for name in factors if name in parts), None)


def scaled(parts: Parts, scale: float) -> dict[str, Tensor]:
    """Return the parts, in fp32, with a scale multiplied into the first one."""
    first = next(name for name in ("hada_w1_a", "lokr_w1", "lokr_w1_a") if name in parts)
    return {name: tensor.float() * scale if name == first else tensor.float() for name, tensor in parts.items()}


def size_of(parts: Parts) -> tuple[int, int]:
    """Return (outputs, inputs) of the layer that the parts fit."""
    first, second = _shapes(parts)
    return first if kind_of(parts) == "loha" else (first[0] * second[0], first[1] * second[1])


def product(parts: Parts) -> Tensor:
    """Return the update [out, in], in the dtype of the parts."""
    if kind_of(parts) == "loha":
        return _whole(parts, "hada_w1") * _whole(parts, "hada_w2")
    return torch.kron(_whole(parts, "lokr_w1").contiguous(), _whole(parts, "lokr_w2").contiguous())


def rows_of(parts: Parts, number: int, count: int) -> dict[str, Tensor]:
    """Return the parts for the rows of share `number` of `count` equal shares of the outputs.

    Where a LoKr's factors cannot be cut, w1 is 1 and w2 the whole update, which takes the size of the weight.
    """
    if kind_of(parts) == "loha":
        return {name: _cut(one, number, count) if name.endswith("_a") else one for name, one in parts.items()}
    left = "lokr_w1" if "lokr_w1" in parts else "lokr_w1_a"
    if len(parts[left]) % count == 0:
        return {name: _cut(one, number, count) if name == left else one for name, one in parts.items()}
    update = product({name: one.float() for name, one in parts.items()})
    return {"lokr_w1": torch.ones(1, 1), "lokr_w2": _cut(update, number, count)}


def with_halves_swapped(parts: Parts) -> dict[str, Tensor]:
    """Return the parts of the update whose lower half of rows comes first."""
    first, second = (rows_of(parts, number, 2) for number in (1, 0))
    return {name: torch.cat([one, second[name]]) if _has_rows(name, first) else one for name, one in first.items()}


def _has_rows(name: str, parts: Parts) -> bool:
    """Return True for a part that `rows_of` cuts."""
    if name.startswith("hada_"):
        return name.endswith("_a")
    is_dense = "lokr_w1" in parts and parts["lokr_w1"].numel() == 1
    return name == "lokr_w2" if is_dense else name in ("lokr_w1", "lokr_w1_a")


def _cut(rows: Tensor, number: int, count: int) -> Tensor:
    return rows.chunk(count)[number].clone()


def _whole(parts: Parts, name: str) -> Tensor:
    return parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]


def _shapes(parts: Parts) -> tuple[tuple[int, int], tuple[int, int]]:
    prefix = "hada" if kind_of(parts) == "loha" else "lokr"

    def shape(name: str) -> tuple[int, int]:
        if name in parts:
            return len(parts[name]), parts[name].shape[1]
        return len(parts[f"{name}_a"]), parts[f"{name}_b"].shape[1]

    return shape(f"{prefix}_w1"), shape(f"{prefix}_w2")

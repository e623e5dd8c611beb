"""The device's peak throughput: matrix products, copies, attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu.cells import Shapes
from benchmarks.gpu.device import Device, outcome_of

TURNS, CALLS = 5, 5


def measure_ceilings(device: Device, shapes: Shapes) -> dict[str, Any]:
    """Measure bf16 products and attention in TFLOP/s, and copies in GB/s (read and written bytes both count).

    One that fails is missing from the figures, and `failed` has the reason by its name.
    """
    found: dict[str, Any] = {}
    for name, measure in {"products": _products, "copies": _copies, "attention": _attention}.items():
        try:
            found.update(measure(device, shapes))
        except Exception as error:  # a failure of a library must not stop the cells
            found.setdefault("failed", {})[name] = outcome_of(error)
        device.clear()
    return found


def _products(device: Device, shapes: Shapes) -> dict[str, float]:
    side = shapes.matrix
    one, other = (torch.randn(side, side, dtype=torch.bfloat16, device=device.torch) for _ in range(2))
    return {"gemm_tflops": 2 * side**3 / _seconds(device, lambda: one @ other) / 1e12}


def _copies(device: Device, shapes: Shapes) -> dict[str, float]:
    source = torch.zeros(shapes.copied_bytes, dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    return {"copy_gbs": 2 * shapes.copied_bytes / _seconds(device, lambda: target.copy_(source)) / 1e9}


def _attention(device: Device, shapes: Shapes) -> dict[str, float]:
    heads, tokens, width = shapes.attention
    query, key, value = (
        torch.randn(1, heads, tokens, width, dtype=torch.bfloat16, device=device.torch, requires_grad=True)
        for _ in range(3)
    )
    gradient = torch.randn_like(query)
    seconds = _seconds(device, lambda: F.scaled_dot_product_attention(query, key, value).backward(gradient))
    # Two products in the forward pass, five in the backward pass, one of them recomputed.
    return {"attention_tflops": 7 * 2 * heads * tokens**2 * width / seconds / 1e12, "attention_ms": 1000 * seconds}


def _seconds(device: Device, compute: Callable[[], object]) -> float:
    """Return the seconds of one call: the median of a few turns after a warm-up."""
    found = []
    for _ in range(1 + TURNS):
        started = device.seconds()
        for _ in range(CALLS):
            compute()
        found.append((device.seconds() - started) / CALLS)
    return statistics.median(found[1:])

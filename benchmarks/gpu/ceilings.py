"""The device's peak throughput: matrix products, copies, attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks.gpu.cells import Shapes
from benchmarks.gpu.device import Device

TURNS, CALLS = 5, 5


def measure_ceilings(device: Device, shapes: Shapes) -> dict[str, float]:
    """Measure bf16 products and attention in TFLOP/s, and copies in GB/s (read and written bytes both count)."""
    side, (heads, tokens, width) = shapes.matrix, shapes.attention
    one, other = (torch.randn(side, side, dtype=torch.bfloat16, device=device.torch) for _ in range(2))
    source = torch.zeros(shapes.copied_bytes, dtype=torch.uint8, device=device.torch)
    target = torch.empty_like(source)
    query, key, value = (
        torch.randn(1, heads, tokens, width, dtype=torch.bfloat16, device=device.torch, requires_grad=True)
        for _ in range(3)
    )
    gradient = torch.randn_like(query)

    def attend() -> None:
        F.scaled_dot_product_attention(query, key, value).backward(gradient)

    product = _seconds(device, lambda: one @ other)
    copy = _seconds(device, lambda: target.copy_(source))
    attention = _seconds(device, attend)
    return {
        "gemm_tflops": 2 * side**3 / product / 1e12,
        "copy_gbs": 2 * shapes.copied_bytes / copy / 1e9,
        # Two products in the forward pass, five in the backward pass, one of them recomputed.
        "attention_tflops": 7 * 2 * heads * tokens**2 * width / attention / 1e12,
        "attention_ms": 1000 * attention,
    }


def _seconds(device: Device, compute: Callable[[], object]) -> float:
    """Return the seconds of one call: the median of a few turns after a warm-up."""
    found = []
    for _ in range(1 + TURNS):
        started = device.seconds()
        for _ in range(CALLS):
            compute()
        found.append((device.seconds() - started) / CALLS)
    return statistics.median(found[1:])

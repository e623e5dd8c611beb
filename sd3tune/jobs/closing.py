"""The closing report: did it learn anything? Measured on the adapter as it was exported."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune.flow.objective import velocity_loss, velocity_target
from sd3tune.jobs.preflight import Plan
from sd3tune.train.batches import Batch, Batches
from sd3tune.train.step import predict_velocity

FIXED_SIGMAS = (0.2, 0.4, 0.6, 0.8)
SEARCHED_STEPS = 64
"""How far to look for images that are not broken."""
NO_CHANGE = 1e-7
"""Relative change of the velocity below which an adapter does nothing; fp32 rounding alone makes about this much."""


@torch.no_grad()
def closing_report(plan: Plan, transformer: Any, weights: Mapping[str, Tensor], batches: Batches) -> dict[str, Any]:
    """Norm of BA per block, change of one denoising step, and the training loss at fixed noise, base and adapter."""
    probes = _probes(batches)
    with plan.method.as_exported(transformer, weights):
        adapted = [predict_velocity(transformer, plan.method, probe).float() for probe in probes]
    with plan.method.disabled(transformer):
        base = [predict_velocity(transformer, plan.method, probe).float() for probe in probes]
    size = sum(b.norm().item() for b in base)
    change = sum((a - b).norm().item() for a, b in zip(adapted, base, strict=True)) / size if size else math.nan
    return {
        "weights": "raw" if plan.config.ema is None else "ema",
        "block_norms": block_norms(plan.method.exported(weights)),
        "velocity_change": change,
        "changes_output": change > NO_CHANGE,  # false for NaN, too
        "fixed_noise_loss": {
            "sigma": list(FIXED_SIGMAS[: len(probes)]),
            "base": _losses(base, probes),
            "adapter": _losses(adapted, probes),
        },
    }


def _losses(velocities: Sequence[Tensor], probes: Sequence[Batch]) -> list[float]:
    """The squared error, whatever was minimised, so that runs compare."""
    return [
        velocity_loss(velocity, velocity_target(probe.latents, probe.noise)).mean().item()
        for velocity, probe in zip(velocities, probes, strict=True)
    ]


def block_norms(factors: Mapping[str, Tensor]) -> dict[str, float]:
    """Frobenius norm of BA over all modules of each block, without forming BA: |BA|^2 = sum((B^T B) * (A A^T))."""
    squares: dict[str, float] = {}
    for name, down in factors.items():
        if name.endswith(".lora_A"):
            a, b = down.double(), factors[name.removesuffix("A") + "B"].double()
            found = re.search(r"\.(\d+)\.", name)
            block = f"block {found[1]}" if found else "elsewhere"
            squares[block] = squares.get(block, 0.0) + ((b.T @ b) * (a @ a.T)).sum().item()
    return {block: max(square, 0.0) ** 0.5 for block, square in squares.items()}


def infer_command(run: Path, prompt: str) -> str:
    """What to type next."""
    relative = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    return shlex.join(
        ["sd3tune", "infer", "--lora", str(relative), "--prompt", prompt, "--out", str(relative / "images")]
    )


def summary(plan: Plan, report: Mapping[str, Any]) -> list[str]:
    """The report in words, and the command to type next."""
    norms, loss = report["block_norms"], report["fixed_noise_loss"]
    largest = max(norms.values()) or 1.0
    bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * norm / largest)] for norm in norms.values())
    by_sigma = ", ".join(
        f"{sigma:g}: {base:.3f} -> {adapter:.3f} ({100 * (adapter / base - 1):+.1f} %)"
        for sigma, base, adapter in zip(loss["sigma"], loss["base"], loss["adapter"], strict=True)
    )
    return [
        f"learned   one denoising step changes by {100 * report['velocity_change']:.3g} %; "
        f"norm of BA per block |{bars}|, at most {max(norms.values()):.3g}",
        f"loss      on training images at fixed noise, by sigma: {by_sigma}",
        f"adapter   {plan.run / 'adapter'}"
        + (" (the average, EMA; as trained: adapter_raw)" if report["weights"] == "ema" else ""),
        "",
        "next:",
        f"  {infer_command(plan.run, plan.records[0].caption or 'a photo')}",
    ]


def _probes(batches: Batches) -> list[Batch]:
    """An image of the training data for each of the sigmas: one, whatever the batch size, for the user is waiting."""
    fetched = (batches.fetch(step, 0) for step in range(SEARCHED_STEPS))
    first = (batch.rows(slice(1)) for batch in fetched)
    usable = itertools.islice((image for image in first if image.latents.isfinite().all()), len(FIXED_SIGMAS))
    return [
        replace(image, sigma=torch.full_like(image.sigma, sigma))
        for image, sigma in zip(usable, FIXED_SIGMAS, strict=False)
    ]

"""The closing report: did it learn anything? Measured on the adapter as it was exported."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune.jobs.preflight import Plan
from sd3tune.train.batches import Batch, Batches
from sd3tune.train.step import velocity_losses

FIXED_SIGMAS = (0.2, 0.4, 0.6, 0.8)
PROBED_STEPS = 4
NO_CHANGE = 1e-7
"""Relative change of the velocity below which an adapter does nothing; fp32 rounding alone makes about this much."""


@torch.no_grad()
def closing_report(plan: Plan, transformer: Any, weights: Mapping[str, Tensor], batches: Batches) -> dict[str, Any]:
    """Norm of BA per block, change of one denoising step, and the training loss on fixed noise, base and adapter."""
    probes = _probes(batches)
    with plan.method.as_exported(transformer, weights):
        adapted = [
            (_velocity(plan, transformer, probe), velocity_losses(transformer, plan.method, probe)) for probe in probes
        ]
    with plan.method.disabled(transformer):
        base = [
            (_velocity(plan, transformer, probe), velocity_losses(transformer, plan.method, probe)) for probe in probes
        ]
    change = sum((a - b).norm().item() for (a, _), (b, _) in zip(adapted, base, strict=True))
    scale = sum(b.norm().item() for b, _ in base)
    norms = block_norms(plan.method.exported(weights))
    relative = change / scale
    return {
        "block_norms": norms,
        "velocity_change": relative,
        "changes_output": relative > NO_CHANGE and all(norm == norm for norm in norms.values()),
        "fixed_noise_loss": {
            "base": torch.cat([loss for _, loss in base]).mean().item(),
            "adapter": torch.cat([loss for _, loss in adapted]).mean().item(),
        },
    }


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
    change = 100 * (loss["adapter"] / loss["base"] - 1)
    return [
        f"learned   one denoising step changes by {100 * report['velocity_change']:.3g} %; "
        f"norm of BA per block |{bars}|, at most {max(norms.values()):.3g}",
        f"loss      on training images at fixed noise: {loss['base']:.4f} without, {loss['adapter']:.4f} with the "
        f"adapter ({change:+.2f} %)",
        f"adapter   {plan.run / 'adapter'}",
        "",
        "next:",
        f"  {infer_command(plan.run, plan.records[0].caption or 'a photo')}",
    ]


def _velocity(plan: Plan, transformer: Any, batch: Batch) -> Tensor:
    """One denoising step at the probe's sigma, on the probe's noise."""
    prompt_embeds, pooled = plan.method.conditioning(batch.embeddings, transformer)
    velocity: Tensor = transformer(
        hidden_states=batch.noise.to(transformer.dtype),
        timestep=1000 * batch.sigma,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return velocity.float()


def _probes(batches: Batches) -> list[Batch]:
    """A few batches of the training data with fixed noise and sigmas."""
    fetched = [batches.fetch(step, 0) for step in range(PROBED_STEPS)]
    return [
        Batch(batch.latents, batch.noise, torch.full_like(batch.sigma, sigma), batch.embeddings, batch.names)
        for batch, sigma in zip(fetched, FIXED_SIGMAS, strict=True)
    ]

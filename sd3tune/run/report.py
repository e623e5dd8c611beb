"""The closing report: tests whether the exported weights have learned anything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune.flow.objective import velocity_loss, velocity_target
from sd3tune.invocation import command_line
from sd3tune.methods import Method
from sd3tune.publish.card import DIVERGED, has_diverged
from sd3tune.publish.files import CARD
from sd3tune.publish.previews import SAMPLES, SHEET, guiding_options
from sd3tune.run.preflight import Plan
from sd3tune.runtime.processes import ALONE, Processes
from sd3tune.training.ahead import modulated
from sd3tune.training.batches import Batch, Batches
from sd3tune.training.metrics import relative_change
from sd3tune.training.step import predict_velocity

FIXED_SIGMAS = (0.2, 0.4, 0.6, 0.8)
PROBE_SEARCH_STEPS = 64
"""Number of steps to search for images with finite latents."""
NO_CHANGE = 1e-7
"""Relative change of the velocity that counts as none: fp32 rounding alone causes about this much."""


@torch.no_grad()
def closing_report(
    plan: Plan, transformer: Any, weights: Mapping[str, Tensor], batches: Batches, processes: Processes = ALONE
) -> dict[str, Any]:
    """Measure the change of each block and of one denoising step, and the loss of base and result at fixed noise.

    If `method.export_dtype` rounds an adapter's weights, also measure the error of one denoising step.
    """
    probes = _probes(batches)
    if processes.lockstep:  # each process has images of its own
        probes = probes[: min(processes.exchange(len(probes)))]
    with plan.method.as_exported(transformer, weights):
        trained = _velocities(plan, transformer, probes)
    rounding = _rounding_error(plan, transformer, weights, probes, trained)
    with plan.method.untrained(transformer):
        base = _velocities(plan, transformer, probes)
    size = _total_norm(base) or _total_norm(trained)  # untrained random weights predict zeros
    change = sum((a - b).norm().item() for a, b in zip(trained, base, strict=True)) / size if size else math.nan
    block_changes = plan.method.block_changes(transformer, weights)
    return {
        "weights": "raw" if plan.config.ema is None else "ema",
        "block_changes": block_changes,
        "velocity_change": change,
        **({} if rounding is None else {"rounding_error": rounding}),
        # False for NaN, too. Equal weights can differ by more at another address, so the weights must differ as well.
        "changes_output": change > NO_CHANGE and any(block_changes.values()),
        "fixed_noise_loss": {
            "sigma": list(FIXED_SIGMAS[: len(probes)]),
            "base": _losses(base, probes),
            "trained": _losses(trained, probes),
        },
    }


def _rounding_error(
    plan: Plan, transformer: Any, weights: Mapping[str, Tensor], probes: Sequence[Batch], rounded: Sequence[Tensor]
) -> float | None:
    """Return the relative error of `rounded`, the exported weights' velocities; None if the file does not round."""
    unrounded = plan.method.unrounded(transformer, weights)
    if unrounded is None:
        return None
    with unrounded:
        exact = _velocities(plan, transformer, probes)
    size = _total_norm(exact)
    return sum((a - b).norm().item() for a, b in zip(rounded, exact, strict=True)) / size if size else math.nan


def _velocities(plan: Plan, transformer: Any, probes: Sequence[Batch]) -> list[Tensor]:
    ready = modulated(probes, transformer, plan.method)
    return [predict_velocity(transformer, plan.method, probe).float() for probe in ready]


def _total_norm(velocities: Sequence[Tensor]) -> float:
    return sum(velocity.norm().item() for velocity in velocities)


def _losses(velocities: Sequence[Tensor], probes: Sequence[Batch]) -> list[float]:
    """Return the mean squared error of each probe, masked; not the minimised loss, so that runs are comparable."""
    return [
        velocity_loss(velocity, velocity_target(probe.latents, probe.noise), probe.position_weights).mean().item()
        for velocity, probe in zip(velocities, probes, strict=True)
    ]


def next_command(plan: Plan) -> str:
    """Return the command that redraws the first prompt's last preview or, without prompts, draws a caption."""
    settings = plan.config.preview
    if settings.prompts:
        first = settings.pictures[0].recipe
        return infer_command(plan.method, plan.run, first["prompt"], settings.seed, guiding_options(first))
    caption = plan.records[0].caption if plan.records else ""
    return infer_command(plan.method, plan.run, caption or "a photo")


def infer_command(method: Method, run: Path, prompt: str, seed: int = 0, options: Sequence[str] = ()) -> str:
    """Return the `infer` command for a run; steps, guidance, size and T5 length come from its contract."""
    relative = _from_here(run)
    what = method.infer_arguments(relative)
    seeded = ["--seed", str(seed)] if seed else []
    words = [*what, "--prompt", prompt, *seeded, *options, "--out", str(relative / "images")]
    return command_line("sd3tune", "infer", *words)


def _from_here(run: Path) -> Path:
    """Return the folder as a user would type it."""
    return run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run


def describe_speed(skipped: Collection[int], steps: int, seconds: float) -> list[str]:
    """Return a line with the throughput, and a warning about skipped steps."""
    lines = [f"{steps} steps in {seconds:.1f} s ({steps / max(seconds, 1e-9):.2f} per second)"]
    if skipped:
        count, first = len(skipped), ", ".join(map(str, list(skipped)[:10]))
        were = "steps were" if count > 1 else "step was"
        lines.append(
            f"warning: {count} {were} skipped, the gradient was not finite: step {first}{', ...' * (count > 10)}"
        )
    return lines


def describe_learning(plan: Plan, report: Mapping[str, Any]) -> list[str]:
    """Return the report as lines of text."""
    changes, loss = report["block_changes"], report["fixed_noise_loss"]
    largest = max(changes.values()) or 1.0
    bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * change / largest)] for change in changes.values())
    by_sigma = ", ".join(
        f"{sigma:g}: {base:.3f} -> {trained:.3f} ({relative_change(trained, base)})"
        for sigma, base, trained in zip(loss["sigma"], loss["base"], loss["trained"], strict=True)
    )
    return [
        f"learned   one denoising step changes by {100 * report['velocity_change']:.3g} %; "
        f"{plan.method.block_measure} |{bars}|, at most {max(changes.values()):.3g}",
        *_describe_rounding(plan, report),
        *_divergence(plan, report),
        f"loss      on training images at fixed noise, by sigma: {by_sigma}",
    ]


def describe_product(plan: Plan, report: Mapping[str, Any]) -> str:
    """Return the line with the folder of the trained weights."""
    product = plan.method.product
    average = f" (the average, EMA; as trained: {product.raw})" if report["weights"] == "ema" else ""
    return f"{product.name:<9} {plan.run / product.name}{average}"


def describe_next(plan: Plan) -> list[str]:
    """Return the lines with contact sheet, card and next commands."""
    sheet, card = plan.run / SAMPLES / SHEET, plan.run / CARD
    return [
        *([f"pictures  {sheet}"] if sheet.is_file() else []),
        *([f"card      {card}"] if card.is_file() else []),
        "",
        "next:",
        f"  {command_line('sd3tune', 'report', str(_from_here(plan.run)))}",
        f"  {next_command(plan)}",
    ]


def _describe_rounding(plan: Plan, report: Mapping[str, Any]) -> list[str]:
    if "rounding_error" not in report:
        return []
    error, written = 100 * report["rounding_error"], plan.method.contract()["export_dtype"]
    return [f"rounding  {written} in the file changes one denoising step by {error:.2g} %"]


def _divergence(plan: Plan, report: Mapping[str, Any]) -> list[str]:
    if not has_diverged(report, from_scratch=plan.base.random is not None):
        return []
    return [
        f"warning: one denoising step changes by more than {100 * DIVERGED:.0f} %, and the loss on training images is "
        "no lower than the base's: the training has diverged; train again with a lower optimizer.lr"
    ]


def _probes(batches: Batches) -> list[Batch]:
    """Return one training image per sigma: one whatever the batch size, to keep the report fast."""
    fetched = (batches.fetch(step, 0) for step in range(PROBE_SEARCH_STEPS))
    first = (batch.rows(slice(1)) for batch in fetched)
    usable = itertools.islice((image for image in first if not (~image.latents.isfinite()).any()), len(FIXED_SIGMAS))
    return [
        replace(image, sigma=torch.full_like(image.sigma, sigma), modulation=None)
        for image, sigma in zip(usable, FIXED_SIGMAS, strict=False)
    ]

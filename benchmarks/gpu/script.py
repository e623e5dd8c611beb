"""Whole runs of diffusers' example script and of `sd3tune train`, on a base of full size on disk."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cells import Shapes
from benchmarks.gpu.device import Device
from benchmarks.gpu.models import random_on_device
from benchmarks.peer.cells import BATCH_SIZE, PeerCell
from benchmarks.peer.commands import our_arguments, peer_arguments
from benchmarks.peer.materials import make_materials, text_encoders
from benchmarks.peer.processes import RunFailed, Stamps, run_alone
from sd3tune.config.sections.model import ModelConfig
from sd3tune.model.base.progress_bars import no_progress_bars
from sd3tune.model.base.resolve import resolve_base, shape_of_base
from sd3tune.model.load.components import empty_transformer

BASE = "sd3-medium"
CELL = PeerCell("small", "one-cached", "bf16")  # 512 px, batch 2; the base lies in the folder of that name
LEAST_SECONDS = 150.0
"""Remaining time needed to start the runs."""


def run_script(script: Path, shapes: Shapes, device: Device, deadline: float) -> dict[str, Any]:
    """Run both commands once, as processes. Return steps, first step, peak memory, and a readable `summary`."""
    left = deadline - time.monotonic()
    if device.torch.type == "cuda" and left < LEAST_SECONDS:
        return {"summary": f"The script itself was not run: {left:.0f} s were left, and it needs {LEAST_SECONDS:.0f}."}
    with tempfile.TemporaryDirectory(prefix="sd3tune-script-") as name:
        folder = Path(name)
        materials = make_materials(folder, ["tiny"])
        materials.bases["small"] = random_pipeline(folder / "base", shapes, device)
        ours = our_arguments(CELL, materials, folder / "store", folder / "run")
        peer = [str(script), *peer_arguments(CELL, materials, folder / "datasets", folder / "peer")]
        try:
            found = {
                side: run_alone(of, arguments, folder, CELL.size.steps)
                for side, of, arguments in (("example", "peer", peer), ("sd3tune", "ours", ours))
            }
        except RunFailed as error:
            return {"summary": f"The script itself could not be compared: {error}"}
    figures = {side: _figures(of) for side, of in found.items()}
    both = ", ".join(f"{side} {of['images_per_s']:.3g} images/s" for side, of in figures.items())
    return {"summary": f"Whole runs on {BASE}, {CELL.size.resolution} px, bf16, latents cached: {both}.", **figures}


def random_pipeline(folder: Path, shapes: Shapes, device: Device) -> Path:
    """Write a base in diffusers' layout: a full-size transformer, shallow text encoders, and tiny's other parts."""
    tiny = resolve_base("tiny").path
    shutil.copytree(tiny, folder)
    base = shape_of_base(ModelConfig(base=shapes.bases[BASE]))
    transformer = random_on_device(empty_transformer(base), torch.bfloat16, device.torch)
    width = transformer.config.joint_attention_dim
    parts = {"transformer": transformer, **(text_encoders(tiny, width) if width == 4096 else {})}
    for part, model in parts.items():
        shutil.rmtree(folder / part)
        with no_progress_bars():
            model.save_pretrained(folder / part, safe_serialization=True)
    device.clear()
    return folder


def _figures(stamps: Stamps) -> dict[str, float]:
    step = statistics.median(stamps.durations(CELL.size.warmup, 0))
    return {
        "images_per_s": BATCH_SIZE / step,
        "step_s": step,
        "first_step_s": stamps.steps[0][0][0] - stamps.started,
        "peak_host_bytes": stamps.peak_bytes,
    }

"""Measure one cell: build and time both sides, one after the other. A failure is a result, too."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import SIDES, Cell, Shapes
from benchmarks.gpu.device import Device, outcome_of
from benchmarks.gpu.models import flops_of
from benchmarks.gpu.sides import SIDE_CLASSES, Side

TURNS = 3
TURN_SECONDS = 1.0


def measure_cell(cell: Cell, shapes: Shapes, device: Device, deadline: float, order: Sequence[str]) -> dict[str, Any]:
    """Return a row of the results; `order` is the order of the sides, `deadline` a time of `time.monotonic`."""
    found = {name: measure_side(name, cell, shapes, device, deadline) for name in order}
    example, ours = (found[name].get("images_per_s") for name in SIDES)
    return {
        "cell": cell.name,
        "base": cell.base,
        "pixels": cell.pixels,
        "batch_size": cell.batch,
        "precision": cell.precision,
        "checkpointing": cell.checkpointing,
        "tflop": cell.batch * _flops_of_an_image(cell.base, cell.pixels, shapes) / 1e12,
        "ratio": ours / example if ours and example else None,
        **{name: found[name] for name in SIDES},
    }


def measure_side(name: str, cell: Cell, shapes: Shapes, device: Device, deadline: float) -> dict[str, Any]:
    """Return the figures of one side, or an `outcome` with the reason for missing figures."""
    try:
        with tempfile.TemporaryDirectory(prefix="sd3tune-gpu-") as folder:
            return _measured(name, cell, shapes, device, deadline, Path(folder))
    except Exception as error:  # a failure of a library must not stop the other cells
        return {"outcome": outcome_of(error)}
    finally:
        device.clear()


def _measured(name: str, cell: Cell, shapes: Shapes, device: Device, deadline: float, folder: Path) -> dict[str, Any]:
    started = device.seconds()
    with device.watching_memory():
        side: Side = SIDE_CLASSES[name](cell, shapes, device.torch, folder)
        built = device.seconds()
        device.restart_peak()
        side.step()
        first = device.seconds()
        side.step()
        peak = device.peak_bytes()
    try:
        once = _seconds(side, device, 1)
        steps = min(max(int(TURN_SECONDS / once), 1), shapes.steps)
        turns = [_seconds(side, device, steps)]
        while len(turns) < TURNS and time.monotonic() + steps * once < deadline:
            turns.append(_seconds(side, device, steps))
        kernels = device.kernels(side.step) if time.monotonic() + 3 * once < deadline else None
    finally:
        side.close()
    step = statistics.median(turns)
    return {
        "outcome": "measured",
        "step_s": step,
        "images_per_s": cell.batch / step,
        "turns_s": turns,
        "steps_per_turn": steps,
        "peak_bytes": peak,
        "kernels": kernels,
        "build_s": built - started,
        "first_step_s": first - started,
    }


def _seconds(side: Side, device: Device, steps: int) -> float:
    """Return the seconds of a step, from several consecutive ones."""
    started = device.seconds()
    for _ in range(steps):
        side.step()
    return (device.seconds() - started) / steps


@functools.cache
def _flops_of_an_image(base: str, pixels: int, shapes: Shapes) -> int:
    return flops_of(Cell(base, pixels, 1), shapes)

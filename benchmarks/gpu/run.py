"""`python -m benchmarks.gpu.run`: compare sd3tune's step with diffusers' example at full size, on one GPU."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bundle import NoBundle, importable

NO_GPU = (
    "torch sees no CUDA device: measure on a machine with a GPU, or run the same code on the CPU by "
    "--device cpu --shapes tiny"
)
RESERVE = 10.0
"""Seconds reserved for finishing."""


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description=__doc__)
    parser.add_argument(
        "--script", type=Path, help="diffusers' train_dreambooth_lora_sd3.py: whole runs of it at the end"
    )
    parser.add_argument("--bundle", type=Path, help="the folder that benchmarks.gpu.bundle made")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop in time for this")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", choices=("full", "tiny"), help="by default full; tiny on the CPU")
    parser.add_argument("--cells", type=int, help="only that many, from the first on")
    options = parser.parse_args(arguments)
    try:
        with importable(options.bundle):
            return _run(options, started + 60 * options.minutes - RESERVE)
    except NoBundle as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, deadline: float) -> int:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"error: {NO_GPU}", file=sys.stderr)
        return 2
    from benchmarks.gpu import report
    from benchmarks.gpu.ceilings import measure_ceilings
    from benchmarks.gpu.cells import SHAPES, cells_of
    from benchmarks.gpu.device import Cpu, Cuda

    device = Cuda() if options.device == "cuda" else Cpu()
    shapes = SHAPES[options.shapes or ("full" if options.device == "cuda" else "tiny")]
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "environment": report.environment(device),
        "command": "python -m benchmarks.gpu.run",
        "ceilings": measure_ceilings(device, shapes),
        "cells": [],
        "not_measured": [],
    }
    device.clear()
    report.write(results, options.out)
    measure_in_time(cells_of(shapes)[: options.cells], shapes, device, deadline, results, options.out)
    if options.script is not None:
        from benchmarks.gpu.script import run_script

        results["script"] = run_script(options.script.resolve(), shapes, device, deadline)
        report.write(results, options.out)
    print(report.table(results))
    print(f"\n{options.out / 'gpu.json'}")
    return 0


def measure_in_time(
    cells: Sequence[Any], shapes: Any, device: Any, deadline: float, results: dict[str, Any], out: Path
) -> None:
    """Measure the cells in order, write the results after each, and skip a cell that would not finish in time."""
    from benchmarks.gpu import report
    from benchmarks.gpu.cells import SIDES
    from benchmarks.gpu.measure import measure_cell

    longest: dict[tuple[str, int], float] = {}  # by the properties that determine the duration of a cell
    for number, cell in enumerate(cells):
        began, kind = time.monotonic(), (cell.base, cell.batch * cell.pixels**2)
        if began + 1.2 * longest.get(kind, max(longest.values(), default=0.0)) >= deadline:
            results["not_measured"].append(cell.name)
            continue
        row = measure_cell(cell, shapes, device, deadline, SIDES if number % 2 else SIDES[::-1])
        longest[kind] = max(longest.get(kind, 0.0), time.monotonic() - began)
        results["cells"].append(row)
        report.write(results, out)
        outcomes = ", ".join(f"{name} {_said(row[name])}" for name in SIDES)
        print(f"{cell.name}: {outcomes}", flush=True)
    report.write(results, out)


def _said(side: dict[str, Any]) -> str:
    return f"{side['step_s']:.3g} s" if side["outcome"] == "measured" else str(side["outcome"])


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.gpu.run`: compare sd3tune's step with diffusers' example at full size, on one GPU."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.options import parser_for, run_on_device

RESERVE = 10.0
"""Seconds reserved for finishing."""


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = parser_for(
        "benchmarks.gpu.run", __doc__, 8.0, "stop in time for this", "runs/bench-gpu", "gpu.json and gpu.md"
    )
    parser.add_argument(
        "--script", type=Path, help="diffusers' train_dreambooth_lora_sd3.py: whole runs of it at the end"
    )
    parser.add_argument("--cells", type=int, help="only that many, from the first on")
    options = parser.parse_args(arguments)
    return run_on_device(options, partial(_run, options, started + 60 * options.minutes - RESERVE))


def _run(options: argparse.Namespace, deadline: float, device: Any, shapes: Any) -> int:
    from benchmarks.gpu import report
    from benchmarks.gpu.ceilings import measure_ceilings
    from benchmarks.gpu.cells import cells_of

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

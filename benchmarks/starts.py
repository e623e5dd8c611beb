"""Time from the start of the command to its first step on `tiny`, with an empty and with a filled store."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path

from benchmarks.peer.cells import CELLS
from benchmarks.peer.commands import our_arguments
from benchmarks.peer.materials import make_materials
from benchmarks.peer.processes import Stamps, run_alone

CELL = CELLS["tiny-fp32-per-image"]
ROUNDS = 3


def run_starts(folder: Path, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Return medians of `cold` starts, with an empty store, and of `warm` starts, with a filled one."""
    materials, store = make_materials(folder, [CELL.base]), folder / "store"
    found: dict[str, list[Stamps]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        shutil.rmtree(store, ignore_errors=True)
        for of in found.values():
            shutil.rmtree(folder / "run", ignore_errors=True)
            of.append(run_alone("ours", our_arguments(CELL, materials, store, folder / "run"), folder, CELL.size.steps))
    return {name: _medians(of) for name, of in found.items()}


def _medians(runs: list[Stamps]) -> dict[str, float]:
    return {
        "first_step_s": statistics.median(of.first_step[0] for of in runs),
        "without_imports_s": statistics.median(of.start[0] for of in runs),
        "peak_bytes": statistics.median(of.peak_bytes for of in runs),
    }

"""One cell: whole runs of both sides in processes of their own, taking turns, and the ratios of each pair."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peer.cells import BATCH_SIZE, CORES, METRICS, PeerCell
from benchmarks.peer.commands import our_arguments, peer_arguments
from benchmarks.peer.materials import Materials

PAIRS, MAX_PAIRS = 2, 4
AGREEMENT = 1.15
"""Further pairs are run while the images/s ratios of a cell lie further apart than this factor."""
ROOT = Path(__file__).parents[2]


class RunFailed(Exception):
    """A side's command failed, or did not do what was asked for."""


@dataclass(frozen=True)
class Figures:
    """What one run of one side came to; see `METRICS`."""

    values: dict[str, float]
    cpu: dict[str, float]
    """Those that are times or speeds, in CPU seconds of all threads: neighbours on the machine hardly change them."""


@dataclass
class Measured:
    ours: list[Figures] = field(default_factory=list)
    peer: list[Figures] = field(default_factory=list)
    warm: Figures | None = None
    """Ours once more, with the store filled."""


def measure_cell(cell: PeerCell, script: Path, materials: Materials, folder: Path) -> Measured:
    """Pairs of runs until they agree, each with an empty store. Raises RunFailed."""
    datasets = folder / "datasets"
    measured = Measured()

    def ours(store: str) -> Figures:
        run = fresh(folder / "run")
        return run_side(cell, "ours", our_arguments(cell, materials, folder / store, run), folder)

    def cold() -> None:
        shutil.rmtree(folder / "store", ignore_errors=True)
        measured.ours.append(ours("store"))

    def peer() -> None:
        run = fresh(folder / "peer")
        measured.peer.append(
            run_side(cell, "peer", [str(script), *peer_arguments(cell, materials, datasets, run)], folder)
        )

    while len(measured.ours) < PAIRS or (
        len(measured.ours) < MAX_PAIRS and disagreement(ratios(measured, "images_per_s")) > AGREEMENT
    ):
        take_turns([cold, peer], len(measured.ours))
    measured.warm = ours("store")
    return measured


def take_turns(sides: Sequence[Callable[[], None]], number: int) -> None:
    """The side that began the last pair ends this one."""
    for side in sides if number % 2 == 0 else reversed(sides):
        side()


def ratios(measured: Measured, metric: str, clock: str = "values") -> list[float]:
    """Pair by pair; above 1 where sd3tune is better."""
    pairs = zip(measured.ours, measured.peer, strict=True)
    compared = [(getattr(ours, clock)[metric], getattr(peer, clock)[metric]) for ours, peer in pairs]
    return [ours / peer if METRICS[metric].larger_is_better else peer / ours for ours, peer in compared]


def disagreement(values: Sequence[float]) -> float:
    return max(values) / min(values)


def rows(cell: PeerCell, measured: Measured) -> list[dict[str, Any]]:
    """A row per metric: medians over the runs, and the median of the pairs' ratios."""
    return [
        {
            "cell": f"{cell.name} {name}",
            "ours": statistics.median(figures.values[name] for figures in measured.ours),
            "peer": statistics.median(figures.values[name] for figures in measured.peer),
            "ratio": statistics.median(ratios(measured, name)),
            "cpu_ratio": statistics.median(ratios(measured, name, "cpu")) if name in measured.ours[0].cpu else None,
            "unit": metric.unit,
            "target": cell.least_speedup if name == "images_per_s" else 1.0,
            "ours_warm": None if measured.warm is None else measured.warm.values[name],
            "pairs": [
                {"ours": ours.values[name], "peer": peer.values[name]}
                for ours, peer in zip(measured.ours, measured.peer, strict=True)
            ],
        }
        for name, metric in METRICS.items()
    ]


def run_side(cell: PeerCell, side: str, arguments: Sequence[str], folder: Path) -> Figures:
    """One run, from the start of its process to its end. Raises RunFailed."""
    stamps, log = folder / "stamps.json", folder / f"{side}.log"
    stamps.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.peer.stamped", str(stamps), side, *arguments]
    with log.open("w") as output:
        started = time.monotonic()
        code = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=output, stderr=output, check=False
        ).returncode
        wall = time.monotonic() - started
    if code:
        raise RunFailed(f"{cell.name}: {side} ended with exit code {code}:\n{_tail(log)}")
    return figures(json.loads(stamps.read_text(encoding="utf-8")), started, wall, cell.size.steps, cell.size.warmup)


def figures(stamps: dict[str, Any], started: float, wall: float, steps: int, warmup: int) -> Figures:
    """From what the runner wrote down. Raises RunFailed when that is another number of steps."""
    times, cpu = ([step[clock] for step in stamps["steps"]] for clock in (0, 1))
    if len(times) != steps:
        raise RunFailed(f"{len(times)} optimizer steps instead of {steps}")
    lasted = [end - begin for begin, end in itertools.pairwise(times[warmup - 1 :])]
    return Figures(
        values={
            "images_per_s": BATCH_SIZE / statistics.median(lasted),
            "peak_memory": stamps["peak_bytes"] / 1e6,
            "first_step": times[0] - started,
            "wall": wall,
        },
        cpu={
            "images_per_s": BATCH_SIZE * (steps - warmup) / (cpu[-1] - cpu[warmup - 1]),
            "first_step": cpu[0],
            "wall": stamps["cpu"],
        },
    )


def environment() -> dict[str, str]:
    """As many threads for both; none of them spins while it waits, and nobody asks the Hub."""
    same = {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **same}


def fresh(run: Path) -> Path:
    shutil.rmtree(run, ignore_errors=True)
    return run


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

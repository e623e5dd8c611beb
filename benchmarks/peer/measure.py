"""Measure one cell: steps in turns for the speed, whole runs in turns for other metrics, and their ratios."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer.cells import BATCH_SIZE, METRICS, PeerCell
from benchmarks.peer.commands import our_arguments, peer_arguments
from benchmarks.peer.materials import Materials
from benchmarks.peer.processes import Stamps, run_alone, run_in_turns

PAIRS, MAX_PAIRS = 2, 3
AGREEMENT = 1.25
"""Another pair of runs is made if the ratios of wall time differ by more than this factor."""


@dataclass(frozen=True)
class Pair:
    """A metric of both sides, measured as close in time as possible; CPU is None for memory."""

    ours: float
    peer: float
    our_cpu: float | None = None
    peer_cpu: float | None = None


@dataclass(frozen=True)
class Measured:
    pairs: dict[str, list[Pair]]
    """Metric -> pairs: one per step for images/s, one per pair of runs for other metrics."""
    warm: dict[str, float]
    """sd3tune alone with a filled store, measured in the first pair."""


def measure_cell(cell: PeerCell, script: Path, materials: Materials, folder: Path) -> Measured:
    """Measure both sides step by step in turns, then as whole runs in turns, with empty stores. Raises RunFailed."""
    steps, store = cell.size.steps, folder / "store"

    def ours(warm: bool = False) -> list[str]:
        if not warm:
            shutil.rmtree(store, ignore_errors=True)
        return our_arguments(cell, materials, store, fresh(folder / "run"))

    def peer() -> list[str]:
        return [str(script), *peer_arguments(cell, materials, folder / "datasets", fresh(folder / "peer"))]

    together = run_in_turns({"ours": ours(), "peer": peer()}, folder, steps, cell.size.turn)
    alone: dict[str, list[Stamps]] = {"ours": [], "warm": [], "peer": []}

    def run_ours() -> None:
        alone["ours"].append(run_alone("ours", ours(), folder, steps))
        alone["warm"].append(run_alone("ours", ours(warm=True), folder, steps))

    def run_peer() -> None:
        alone["peer"].append(run_alone("peer", peer(), folder, steps))

    pairs: dict[str, list[Pair]] = {}
    for number in range(MAX_PAIRS):
        take_turns([run_ours, run_peer], number)
        pairs = pairs_of_runs(alone["ours"], alone["peer"], alone["warm"])
        if number + 1 >= PAIRS and disagreement([of.peer / of.ours for of in pairs["wall"]]) <= AGREEMENT:
            break
    speed = pairs_of_steps(together["ours"], together["peer"], cell.size.warmup)
    warm = alone["warm"][:1]
    alone_again = {name: of[0].ours for name, of in pairs_of_runs(warm, warm, warm).items()}
    return Measured({"images_per_s": speed, **pairs}, alone_again)


def pairs_of_steps(ours: Stamps, peer: Stamps, warmup: int) -> list[Pair]:
    """Return images per second of each step, paired with the other side's step at the same time."""
    speeds = [
        [BATCH_SIZE / took for took in side.durations(warmup, clock)] for clock in (0, 1) for side in (ours, peer)
    ]
    return [Pair(*figures) for figures in zip(*speeds, strict=True)]


def pairs_of_runs(ours: Sequence[Stamps], peer: Sequence[Stamps], warm: Sequence[Stamps]) -> dict[str, list[Pair]]:
    """Return the pairs of whole runs: sd3tune with an empty store, or for `warm_start` a filled one, and the peer."""
    pairs = list(zip(ours, peer, strict=True))
    return {
        "peak_memory": [Pair(a.peak_bytes / 1e6, b.peak_bytes / 1e6) for a, b in pairs],
        "first_step": [Pair(a.first_step[0], b.first_step[0], a.first_step[1], b.first_step[1]) for a, b in pairs],
        "warm_start": [Pair(a.start[0], b.start[0], a.start[1], b.start[1]) for a, b in zip(warm, peer, strict=True)],
        "wall": [Pair(a.ended - a.started, b.ended - b.started, a.cpu, b.cpu) for a, b in pairs],
    }


def take_turns(sides: Sequence[Callable[[], None]], number: int) -> None:
    """Run both sides, in reverse order for odd pairs."""
    for side in sides if number % 2 == 0 else reversed(sides):
        side()


def disagreement(values: Sequence[float]) -> float:
    return max(values) / min(values)


def better(metric: str, ours: float, peer: float) -> float:
    """Return a ratio that is above 1 if sd3tune is better."""
    return ours / peer if METRICS[metric].larger_is_better else peer / ours


def rows(cell: PeerCell, measured: Measured) -> list[dict[str, Any]]:
    """Return a row per metric: the medians of both sides, and the median of the pairs' ratios."""
    return [_row(cell, name, pairs, measured.warm.get(name)) for name, pairs in measured.pairs.items()]


def _row(cell: PeerCell, metric: str, pairs: Sequence[Pair], warm: float | None) -> dict[str, Any]:
    ratios = [better(metric, of.ours, of.peer) for of in pairs]
    cpu = [better(metric, of.our_cpu, of.peer_cpu) for of in pairs if of.our_cpu and of.peer_cpu]
    return {
        "cell": f"{cell.name} {metric}",
        "ours": statistics.median(of.ours for of in pairs),
        "peer": statistics.median(of.peer for of in pairs),
        "ratio": statistics.median(ratios),
        "cpu_ratio": statistics.median(cpu) if cpu else None,
        "unit": METRICS[metric].unit,
        "target": cell.target(metric),
        "ours_warm": warm,
        "ratios": [round(ratio, 4) for ratio in ratios],
        "cpu_ratios": [round(ratio, 4) for ratio in cpu],
    }


def fresh(run: Path) -> Path:
    shutil.rmtree(run, ignore_errors=True)
    return run

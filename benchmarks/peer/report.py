"""The table of ratios, and the files: `results/peer.json`, the README between its markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peer.cells import CAPTIONS, CELLS, METRICS
from benchmarks.report import environment, provenance, replace_between
from sd3tune.atomic import write_json

__all__ = ["environment", "table", "write"]

_HEADINGS = ["base", "dtype", "captions", "images/s: ours, peer", *METRICS, "target"]
_TITLES = {
    "images_per_s": "images/s",
    "peak_memory": "peak memory",
    "first_step": "first step",
    "warm_start": "warm start",
    "wall": "wall time",
}


def table(results: dict[str, Any]) -> str:
    """The ratios as Markdown, a line per cell."""
    by_name = {row["cell"]: row for row in results["cells"]}
    headings = [_TITLES.get(heading, heading) for heading in _HEADINGS]
    lines = [headings, ["---"] * len(headings)]
    for name, cell in CELLS.items():
        found = {metric: by_name[f"{name} {metric}"] for metric in METRICS if f"{name} {metric}" in by_name}
        if found:
            speed = found["images_per_s"]
            size = f"{cell.base}, {cell.size.resolution} px"
            absolute = f"{speed['ours']:.3g}, {speed['peer']:.3g}"
            ratios = [f"{row['ratio']:.2f}" for row in found.values()]
            lines.append([size, cell.dtype, CAPTIONS[cell.captions], absolute, *ratios, _verdict(found)])
    gate = results["gate"]
    return "\n".join(
        [
            *provenance(results["environment"]),
            f"Gate: losses {gate['loss_relative_error']:.1e} apart, cosine of gradients {gate['gradient_cosine']:.7f}.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
    )


def write(results: dict[str, Any], folder: Path) -> None:
    """`folder/results/peer.json`, and the table in `folder/README.md`."""
    write_json(folder / "results" / "peer.json", results)
    replace_between(folder / "README.md", "peer", table(results))


def _verdict(found: dict[str, dict[str, Any]]) -> str:
    behind = [_TITLES[metric] for metric, row in found.items() if row["ratio"] < row["target"]]
    goal = found["images_per_s"]["target"]
    return f"{goal:g}x images/s " + (f"missed: {', '.join(behind)}" if behind else "met")

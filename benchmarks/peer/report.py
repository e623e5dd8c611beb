"""The table of ratios, and the files: `results/peer.json`, the README between its markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peer.cells import CAPTIONS, CELLS, METRICS
from benchmarks.report import commit_of, environment, provenance, replace_between
from sd3tune.files.atomic import write_json

__all__ = ["environment", "table", "write"]

_HEADINGS = ["base", "dtype", "captions", "images/s: ours, peer", *METRICS, "target"]
_OF_THE_CODE = {"commit", "uncommitted_changes"}
_TITLES = {
    "images_per_s": "images/s",
    "peak_memory": "peak memory",
    "first_step": "first step",
    "warm_start": "warm start",
    "wall": "wall time",
}


def table(results: dict[str, Any]) -> str:
    """Return the ratios as Markdown, one line per cell."""
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
            *_commits(results),
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
    )


def write(results: dict[str, Any], folder: Path) -> None:
    """Write `folder/results/peer.json`, and the table in `folder/README.md`.

    Existing rows that were not measured again stay, with their commit, if machine and libraries are the same.
    """
    file = folder / "results" / "peer.json"
    if file.exists():
        results = {
            **results,
            "cells": [*results["cells"], *_still_valid(json.loads(file.read_text(encoding="utf-8")), results)],
        }
    write_json(file, results)
    replace_between(folder / "README.md", "peer", table(results))


def _still_valid(earlier: dict[str, Any], results: dict[str, Any]) -> list[dict[str, Any]]:
    def place(document: dict[str, Any]) -> dict[str, Any]:
        environment = {key: value for key, value in document["environment"].items() if key not in _OF_THE_CODE}
        return {"script": document.get("script_sha256"), **environment}

    if place(earlier) != place(results):
        return []
    measured, commit = {row["cell"] for row in results["cells"]}, commit_of(earlier["environment"])
    return [
        {"commit": commit, **row}
        for row in earlier["cells"]
        if row["cell"] not in measured and row["cell"].split()[0] in CELLS
    ]


def _commits(results: dict[str, Any]) -> list[str]:
    """Return a line for each other commit at which cells were measured."""
    cells: dict[str, list[str]] = {}
    for row in results["cells"]:
        cell = row["cell"].split()[0]
        if row.get("commit") and cell not in cells.setdefault(row["commit"], []):
            cells[row["commit"]].append(cell)
    return [f"Of commit {commit}: {', '.join(names)}." for commit, names in cells.items()]


def _verdict(rows_by_metric: dict[str, dict[str, Any]]) -> str:
    behind = [_TITLES[metric] for metric, row in rows_by_metric.items() if row["ratio"] < row["target"]]
    goal = rows_by_metric["images_per_s"]["target"]
    return f"{goal:g}x images/s " + (f"missed: {', '.join(behind)}" if behind else "met")

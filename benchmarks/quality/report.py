"""The tables of `benchmarks/README.md` and `results/quality.json`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import environment, provenance, replace_between
from sd3tune.atomic import write_json

__all__ = ["environment", "load", "tables", "write"]

Figures = Mapping[str, Mapping[str, float]]
"""`kind/group/name/seed` or `kind/name/seed` -> share by name."""


def load(folder: Path) -> dict[str, Any]:
    """What was measured so far; empty at first."""
    file = folder / "results" / "quality.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def write(results: dict[str, Any], folder: Path) -> None:
    write_json(folder / "results" / "quality.json", results)
    replace_between(folder / "README.md", "quality", tables(results))


def tables(results: dict[str, Any]) -> str:
    """The base, and the LoRAs, as Markdown."""
    figures = results["figures"]
    parts = [[*provenance(results["environment"]), f"{results['settings']['prompts']} prompts behind each share."]]
    if any(name.startswith("base/") for name in figures):
        parts.append(_base_table(figures))
    if any(name.startswith("lora/") for name in figures):
        parts.append(_lora_table(figures))
    if any(name.startswith("peer/") for name in figures):
        parts.append(_peer_table(figures))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _base_table(figures: Figures) -> list[str]:
    runs = _seeds_of(figures, "base/all")
    rows = [[question, _spread([run[question] for run in runs])] for question in runs[0]]
    return _markdown(["nano is asked for", "drawn right, %"], rows)


def _lora_table(figures: Figures) -> list[str]:
    names = dict.fromkeys(name.rpartition("/")[0] for name in figures if name.startswith("lora/"))
    base = _seeds_of(figures, "lora/none/the base")
    rows = []
    for name in names:
        runs = _seeds_of(figures, name)
        drifts = [before["named"] - after["named"] for before, after in zip(base, runs, strict=False)]
        seconds = [run["train_s"] for run in runs if "train_s" in run]
        rows.append(
            [
                *name.split("/")[1:],
                _spread([run["subject"] for run in runs]),
                _spread(drifts),
                _spread([run["class_lost"] for run in runs]),
                f"{statistics.median(seconds):.0f}" if seconds else "",
            ]
        )
    headings = ["", "", "subject right, %", "other shapes lost, %", "class prompts that show the subject, %", "s"]
    return _markdown(headings, rows)


def _peer_table(figures: Figures) -> list[str]:
    rows = []
    for kind in dict.fromkeys(name.split("/")[1] for name in figures if name.startswith("peer/")):
        runs = _seeds_of(figures, f"peer/{kind}")
        base = _seeds_of(figures, "lora/none/the base")
        for side, title in (("ours", "sd3tune"), ("peer", "the script"), ("peer, as long", "the script, as long")):
            drifts = [before["named"] - run[f"{side}: named"] for before, run in zip(base, runs, strict=False)]
            rows.append(
                [
                    kind,
                    title,
                    f"{statistics.median(run[f'{side}: steps'] for run in runs):.0f}",
                    f"{statistics.median(run[f'{side}: train_s'] for run in runs):.0f}",
                    _spread([run[f"{side}: subject"] for run in runs]),
                    _spread(drifts),
                ]
            )
    return _markdown(["", "", "steps", "s", "subject right, %", "other shapes lost, %"], rows)


def _seeds_of(figures: Figures, name: str) -> list[Mapping[str, float]]:
    return [figures[key] for key in sorted(figures) if key.rpartition("/")[0] == name]


def _spread(shares: Sequence[float]) -> str:
    """Mean and range over the seeds, in per cent."""
    low, high = (100 * bound(shares) for bound in (min, max))
    return f"{100 * statistics.mean(shares):.1f} ({low:.1f} to {high:.1f})"


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *rows)]

"""The tables of `benchmarks/README.md` and `results/quality.json`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.intervals import differs, mean_and_half_width
from benchmarks.quality.variants import BESIDE_THE_SCRIPT, RECIPE, VARIANTS
from benchmarks.report import environment, provenance, replace_between
from sd3tune.files.atomic import write_json

Figures = Mapping[str, Mapping[str, float]]
"""`kind/group/name/seed` or `kind/name/seed` -> share by name."""

_SHARES = (
    "subject right, %", "shapes of the prior lost, %", "other shapes lost, %", "class prompts that show the subject, %"
)  # fmt: skip
BASE = "none/the base"
REFERENCE = f"{RECIPE.group}/{RECIPE.name}"
"""The row that others are compared with."""


def load(folder: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the existing figures with these settings."""
    file = folder / "results" / "quality.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return dict(found["figures"]) if found.get("settings") == settings else {}


def add(name: str, measured: Mapping[str, float], settings: Mapping[str, Any], folder: Path) -> None:
    """Add a figure to the JSON and the tables, without losing the figures of other processes."""
    with _alone_in(folder):
        figures = {**load(folder, settings), name: dict(measured)}
        results = {"settings": settings, "environment": environment(), "figures": dict(sorted(figures.items()))}
        write_json(folder / "results" / "quality.json", results)
        replace_between(folder / "README.md", "quality", tables(results))


def tables(results: dict[str, Any]) -> str:
    """Return the base, and the LoRAs, as Markdown."""
    figures = results["figures"]
    parts = [[*provenance(results["environment"]), _asked(results["settings"])]]
    if any(name.startswith("base/") for name in figures):
        parts.append(_base_table(figures))
    if any(name.startswith("lora/") for name in figures):
        parts.append(_lora_table(figures))
    if any(name.startswith("peer/") for name in figures):
        parts.append(_peer_table(figures))
    return "\n\n".join("\n".join(lines) for lines in parts)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock the folder, not its files, which are replaced, against writers in other processes."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _asked(settings: Mapping[str, Any]) -> str:
    """Return a line about the number of prompts and trainings, and the recipe."""
    recipe = ", ".join(f"{name} {value}" for name, value in settings["recipe"].items())
    return (
        f"{settings['prompts']} prompts and one training behind a share, for each of the seeds. "
        f"Recipe: {recipe}; drawn in {settings['sampler steps']} steps."
    )


def _base_table(figures: Figures) -> list[str]:
    runs = _seeds_of(figures, "base/all").values()
    rows = [[question, mean_and_half_width([100 * run[question] for run in runs])] for question in next(iter(runs))]
    return _markdown(["nano is asked for", "drawn right, %"], rows)


def _lora_table(figures: Figures) -> list[str]:
    reference = _outcomes(figures, f"lora/{REFERENCE}")
    rows = []
    for name in (BASE, *(f"{variant.group}/{variant.name}" for variant in VARIANTS)):
        found = _outcomes(figures, f"lora/{name}")
        if found:
            rows.append([*name.split("/"), *_compared(found, reference if name not in (BASE, REFERENCE) else {})])
    return _markdown(["", "", *_SHARES], rows)


def _peer_table(figures: Figures) -> list[str]:
    rows = []
    for kind in BESIDE_THE_SCRIPT:
        runs = _seeds_of(figures, f"peer/{kind}")
        if not runs:
            continue
        reference = _outcomes(figures, f"peer/{kind}", "ours: ")
        for side, title in (("ours", "sd3tune"), ("peer", "the script"), ("peer, as long", "the script, as long")):
            steps, seconds = (
                f"{statistics.median(run[f'{side}: {name}'] for run in runs.values()):.0f}"
                for name in ("steps", "cpu_s")
            )
            found = _outcomes(figures, f"peer/{kind}", f"{side}: ")
            rows.append([kind, title, steps, seconds, *_compared(found, reference if side != "ours" else {})])
    return _markdown(["", "", "steps", "CPU s", *_SHARES], rows)


Outcomes = Mapping[str, Sequence[float]]
"""Seed -> the percentages of `_SHARES`."""


def _outcomes(figures: Figures, name: str, prefix: str = "") -> Outcomes:
    """Return the outcomes of a training for each seed for which the base was measured with the same prompts.

    Lost shapes are the base's share minus the training's.
    """
    base = _seeds_of(figures, f"lora/{BASE}")
    return {
        seed: [
            100 * run[f"{prefix}subject"],
            *(100 * (base[seed][kind] - run[f"{prefix}{kind}"]) for kind in ("named", "others")),
            100 * run[f"{prefix}class_lost"],
        ]
        for seed, run in _seeds_of(figures, name).items()
        if seed in base
    }


def _compared(found: Outcomes, reference: Outcomes) -> list[str]:
    """Return the mean of each outcome with its interval, and `*` where it differs from the reference, seed by seed."""
    both = [seed for seed in found if seed in reference]
    cells = []
    for place in range(len(_SHARES)):
        of, other = ([outcomes[seed][place] for seed in both] for outcomes in (found, reference))
        mark = " *" if both and differs(of, other) else ""
        cells.append(mean_and_half_width([outcome[place] for outcome in found.values()]) + mark)
    return cells


def _seeds_of(figures: Figures, name: str) -> dict[str, Mapping[str, float]]:
    """Return seed -> figures."""
    return {seed: figures[key] for key in sorted(figures) for at, _, seed in [key.rpartition("/")] if at == name}


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *rows)]

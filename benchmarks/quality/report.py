"""The tables of `benchmarks/README.md` and `results/quality.json`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.intervals import differs, mean_and_half_width
from benchmarks.quality.methods import DATA, METHODS, SUBJECTS
from benchmarks.quality.protocol import KINDS, PROTOCOL
from benchmarks.quality.variants import BESIDE_THE_SCRIPT, RECIPE, VARIANTS, Variant
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
    for kind, table in _TABLES.items():
        if any(name.startswith(f"{kind}/") and not name.startswith(f"lora/{BASE}/") for name in figures):
            parts.append(table(figures))
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


def _method_table(figures: Figures) -> list[str]:
    reference = _outcomes(figures, f"method/{METHODS[0].group}/{METHODS[0].name}")
    rows = []
    for variant in METHODS:
        runs = _seeds_of(figures, f"method/{variant.group}/{variant.name}")
        found = _outcomes(figures, f"method/{variant.group}/{variant.name}")
        if found:
            size, seconds = (statistics.median(run[key] for run in runs.values()) for key in ("size_kb", "cpu_s"))
            compared = _compared(found, reference if variant is not METHODS[0] else {})
            rows.append([variant.name, f"{size:.0f}", f"{seconds:.0f}", *compared])
    return _markdown(["method, learning rate", "KB", "CPU s of 100 steps", *_SHARES], rows)


def _data_table(figures: Figures) -> list[str]:
    rows = []
    for variant in DATA:
        name = f"data/{variant.group}/{variant.name}"
        found = _outcomes(figures, name)
        if found:
            reference = _outcomes(figures, f"data/{REFERENCE}") if name != f"data/{REFERENCE}" else {}
            second = [100 * run["second"] for run in _seeds_of(figures, name).values()]
            rows.append([variant.group, variant.name, *_compared(found, reference), mean_and_half_width(second)])
    return _markdown(["", "", *_SHARES, "a second thing beside the subject, %"], rows)


def _plain_table(kind: str, variants: Sequence[Variant], columns: Mapping[str, str], factor: float) -> TableOf:
    """Return a function that makes the table of a kind: a row for each variant, marked against the first one."""

    def table(figures: Figures) -> list[str]:
        rows = []
        first = _seeds_of(figures, f"{kind}/{variants[0].group}/{variants[0].name}")
        for variant in variants:
            runs = _seeds_of(figures, f"{kind}/{variant.group}/{variant.name}")
            cells = []
            for key in columns if runs else ():
                values = [factor * run[key] for run in runs.values()]
                both = [seed for seed in runs if seed in first and variant is not variants[0]]
                pairs = [[of[seed][key] for seed in both] for of in (runs, first)]
                mark = " *" if both and differs(*pairs) else ""
                cells.append(mean_and_half_width(values, digits=1 if factor == 100 else 2) + mark)
            if runs:
                rows.append([variant.group, variant.name, *cells, *_verdicts(list(runs.values()))])
        verdicts = ["verdicts"] if kind == "protocol" else []
        return _markdown(["", "", *columns.values(), *verdicts], rows)

    return table


def _verdicts(runs: Sequence[Mapping[str, float]]) -> list[str]:
    """Return how often each verdict was given, as one cell; none for runs without verdicts."""
    if not all(kind in run for run in runs for kind in KINDS):
        return []
    counts = {kind: sum(run[kind] == 1 for run in runs) for kind in KINDS}
    return [", ".join(f"{kind} {count}" for kind, count in counts.items() if count)]


TableOf = Callable[[Figures], list[str]]
_TABLES: Mapping[str, TableOf] = {
    "base": _base_table,
    "lora": _lora_table,
    "method": _method_table,
    "data": _data_table,
    "subjects": _plain_table(
        "subjects",
        SUBJECTS,
        {
            "first": "the heart right, %",
            "second": "the crown right, %",
            "both": "both in one picture right, %",
            "bled": "pictures of one that show the other, %",
        },
        100,
    ),
    "protocol": _plain_table(
        "protocol",
        PROTOCOL,
        {"likeness": "likeness", "drift": "drift", "prompts": "prompts, over the base", "diversity": "diversity"},
        1,
    ),
    "peer": _peer_table,
}


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

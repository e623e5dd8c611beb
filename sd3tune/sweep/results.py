"""The results of a sweep: the best trial, the table, and `sweep.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd3tune.files.atomic import write_json
from sd3tune.sweep.settings import Sweep
from sd3tune.sweep.trials import Row

RESULTS = "sweep.json"
_VERSION = 1
"""Value of the key `sd3tune_sweep`."""


def best_row(rows: Sequence[Row], sweep: Sweep) -> Row | None:
    """Return the first trial with the best objective; None if none is complete."""
    complete = [row for row in rows if row.value is not None]
    return (min if sweep.minimises else max)(complete, key=lambda row: row.value or 0.0, default=None)


def describe_row(row: Row, sweep: Sweep, best: Row | None) -> str:
    """Return the line about a trial that has ended."""
    start = f"{row.name}  {' '.join(row.overrides)}"
    if row.value is None:
        at = f" at step {row.step}" if row.step is not None else ""
        return f"{'warning: ' * (row.state == 'failed')}{start}: {row.state}{at}: {row.reason}"
    return f"{start}: {sweep.objective} {row.value:.6g} at step {row.step}" + ", the best so far" * (row is best)


def table(rows: Sequence[Row], sweep: Sweep) -> list[str]:
    """Return the table, best trials first; the others by number."""
    keys = list(sweep.axes)
    cells = [["trial", *keys, sweep.objective, "step", "state"]]
    for row in ranked(rows, sweep):
        values = dict(text.split("=", 1) for text in row.overrides)
        value, step = "-" if row.value is None else f"{row.value:.6g}", "-" if row.step is None else str(row.step)
        cells.append([row.name, *(shown(values.get(key, "-")) for key in keys), value, step, row.state])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def ranked(rows: Sequence[Row], sweep: Sweep) -> list[Row]:
    """Return the complete trials from the best one on, then the others by number."""
    sign = 1 if sweep.minimises else -1
    return sorted(rows, key=lambda row: (row.value is None, sign * (row.value or 0.0), row.number))


def shown(text: str) -> str:
    """Return a value of an axis for a table: numbers with six digits."""
    try:
        return text if text.lstrip("-").isdigit() else f"{float(text):.6g}"
    except ValueError:
        return text


def write_results(folder: Path, rows: Sequence[Row], sweep: Sweep) -> Path:
    """Write `sweep.json`, which depends on the trials alone, not on when or in which order they ran."""
    best = best_row(rows, sweep)
    values: dict[str, Any] = {
        "sd3tune_sweep": _VERSION,
        "name": sweep.name,
        "objective": sweep.objective,
        "direction": "minimize" if sweep.minimises else "maximize",
        "sampler": sweep.sampler,
        "seed": sweep.seed,
        "axes": sweep.axes,
        "best": best and best.name,
        "trials": [
            {
                "trial": row.name,
                "state": row.state,
                "overrides": list(row.overrides),
                "value": row.value,
                "step": row.step,
                "reason": row.reason,
            }
            for row in rows
        ],
    }
    write_json(folder / RESULTS, values)
    return folder / RESULTS

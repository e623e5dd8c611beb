"""The measurements of a run during its training: the lines of `eval.jsonl`, the best one, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sd3tune.evaluation.measuring import CLASS_SUBJECT, DIVERSITY, PROMPT, SUBJECT, Measured
from sd3tune.evaluation.pictures import BASE_ROW
from sd3tune.evaluation.rows import Row, RowName, rows_of
from sd3tune.measures.intervals import Interval, share
from sd3tune.measures.verdict import LIMITS

Line = Mapping[str, Any]
CURVES = ("likeness", "base_likeness", "share", "drift", "base_drift", "drift_share", "prompt", "base_prompt",
          "diversity", "base_diversity", "copies")  # fmt: skip
"""The figures that trackers get."""


def measured_line(measured: Measured, step: int, row: str) -> dict[str, Any] | None:
    """Return the figures of a step's pictures, by the first encoder of likeness and the first of prompts.

    Means over prompts and seeds, as cosines; None where something was not measured. `share` is 0 for the base and 1 for
    the photos among themselves; `drift_share` is the gain of the class prompts' likeness over the base's, as a share of
    the same way. Returns None if no encoder measured likeness.
    """
    photos, base, own = rows_of(measured, [RowName(BASE_ROW, "base"), RowName(row, "trained", step)])
    encoder = next((name for measure, name in own.figures if measure == SUBJECT), None)
    if encoder is None:
        return None
    of_prompts = next((name for measure, name in own.figures if measure == PROMPT), None)
    likeness = own.figures[SUBJECT, encoder].interval
    floor, ceiling = (_mean(one, SUBJECT, encoder) for one in (base, photos))
    drift, of_base = (_mean(one, CLASS_SUBJECT, encoder) for one in (own, base))
    moved = None if drift is None or of_base is None or floor is None else drift - of_base + floor
    return {
        "step": step,
        "encoder": encoder,
        "prompt_encoder": of_prompts,
        "pictures": own.pictures,
        "likeness": likeness.mean,
        "likeness_low": _known(likeness.low),
        "likeness_high": _known(likeness.high),
        "base_likeness": floor,
        "photos_likeness": ceiling,
        "share": _share(likeness.mean, floor, ceiling),
        "drift": drift,
        "base_drift": of_base,
        "drift_share": _share(moved, floor, ceiling),
        "prompt": _mean(own, PROMPT, of_prompts),
        "base_prompt": _mean(base, PROMPT, of_prompts),
        "diversity": _mean(own, DIVERSITY, encoder),
        "base_diversity": _mean(base, DIVERSITY, encoder),
        "copies": own.copies,
    }


def comparable(lines: Sequence[Line]) -> list[Line]:
    """Return the lines that were measured as the last one was: same prompts, seeds, sampler settings and encoder."""
    return [line for line in lines if all(line[name] == lines[-1][name] for name in ("setting", "encoder"))]


def best_of(lines: Sequence[Line], drift_limit: float | None) -> Line | None:
    """Return the first line with the highest likeness whose drift is within the limit; None without one.

    Compares the `comparable` lines. The limit is a share (see `measured_line`), by default that of the verdict. A line
    without a share of drift counts as within.
    """
    limit = LIMITS.drift if drift_limit is None else drift_limit
    within = [line for line in comparable(lines) if not _drifts(line, limit)]
    return max(within, key=lambda line: float(line["likeness"]), default=None)


def without_a_better_one(lines: Sequence[Line], drift_limit: float | None) -> int:
    """Return the number of comparable measurements after the best one, or all of them if none is within the limit."""
    best = best_of(lines, drift_limit)
    return sum(best is None or line["step"] > best["step"] for line in comparable(lines)) if lines else 0


def describe(line: Line) -> str:
    """Return a measurement in words."""
    photos = "" if line["photos_likeness"] is None else f" of the photos' own {line['photos_likeness']:.2f}"
    text = f"step {line['step']}: likeness {line['likeness']:.3f}{photos} ({line['encoder']})"
    if line["base_likeness"] is not None:
        text += f", base {line['base_likeness']:.3f}"
    if line["prompt"] is not None:
        text += f"; prompts {line['prompt']:.3f}, base {line['base_prompt']:.3f}"
    if line["drift"] is not None:
        text += f"; class prompts {line['drift']:.3f}, base {line['base_drift']:.3f}"
    return text


def _drifts(line: Line, limit: float) -> bool:
    drift = line.get("drift_share")
    return drift is not None and drift > limit


def _mean(row: Row, measure: str, encoder: str | None) -> float | None:
    figure = None if encoder is None else row.figures.get((measure, encoder))
    return None if figure is None else _mean_of(figure.interval)


def _mean_of(interval: Interval) -> float | None:
    return _known(interval.mean)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _share(value: float | None, floor: float | None, ceiling: float | None) -> float | None:
    return None if value is None or floor is None or ceiling is None else _known(share(value, floor, ceiling))

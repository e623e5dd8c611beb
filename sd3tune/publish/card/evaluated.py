"""The section on an evaluation: the rows of `eval.json`, in a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sd3tune.publish.card.markdown import table
from sd3tune.publish.card.trained import Trained

EVAL_FOLDER, EVAL_FILE = "eval", "eval.json"
EVAL_VERSION = 1
"""Value of the key `sd3tune_eval`; a file of another version is ignored."""
_TITLES = {"subject": "likeness", "held_out": "to held-out photos", "prompt": "prompt", "diversity": "diversity",
           "class_subject": "class prompts"}  # fmt: skip
"""Measure -> title, for the measures that a card shows."""


def evaluated_section(trained: Trained) -> str | None:
    """Return the section; None without an evaluation of this version, or if its file was damaged by an edit."""
    values = trained.evaluation
    if values is None or values.get("sd3tune_eval") != EVAL_VERSION:
        return None
    try:
        return _section(values)
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _section(values: Mapping[str, Any]) -> str:
    rows = values["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in _keys(row)))
    columns.sort(key=lambda key: list(_TITLES).index(key[1]))
    header = ["", *(f"{_TITLES[measure]}, {encoder}" for encoder, measure in columns)]
    body = ([row["name"], *(_cell(row, encoder, measure) for encoder, measure in columns)] for row in rows)
    return "\n\n".join(["## How it draws", values["verdict"]["sentence"], table(header, body), _explanation(values)])


def _keys(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for encoder, figures in row["figures"].items():
        for measure in figures:
            if measure in _TITLES:
                yield encoder, measure


def _cell(row: Mapping[str, Any], encoder: str, measure: str) -> str:
    figure = row["figures"].get(encoder, {}).get(measure)
    if figure is None or figure["mean"] is None:
        return "-"
    if figure["low"] is None:
        return f"{figure['mean']:.3f}"
    return f"{figure['mean']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def _explanation(values: Mapping[str, Any]) -> str:
    count, seeds = len(values["prompts"]), values["seeds"]
    by = _sources(values["encoders"])
    return (
        f"Mean and 95 % interval over {count} prompt{'s' * (count != 1)} and {seeds} seed{'s' * (seeds != 1)}, as "
        "cosines: likeness to the training photos (the row of the photos compares them with each other), and agreement "
        f"with the prompt. Class prompts ask for the class alone and should not look like the photos. Measured by {by}."
    )


def _sources(encoders: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{one['name']} ({one['source']})" for one in encoders if "unavailable" not in one)

"""The files of a run that a page shows; a damaged or missing file leaves its part empty, and a note."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.config import Config, load_config
from sd3tune.config.run_folder import CONFIG_FILE, METRICS_FILE, read_run_file
from sd3tune.errors import RunError, UserError
from sd3tune.publish.card import Trained
from sd3tune.publish.previews import SAMPLES, preview_recipe
from sd3tune.run.card import evaluation_of, last_previews, written_contract
from sd3tune.run.folder import read_evaluations, read_validation
from sd3tune.run.listing import RunSummary, summarize_run
from sd3tune.run.previews import Preview, previews_of
from sd3tune.training.checkpoint import checkpoint_at
from sd3tune.training.metrics import Line, read_metrics


@dataclass(frozen=True)
class RunFiles:
    """A run as its folder shows it now."""

    summary: RunSummary
    config: Config | None
    facts: Mapping[str, Any]
    """Content of `run.json`."""
    metrics: Sequence[Line]
    validation: Sequence[Line]
    evaluations: Sequence[Line]
    previews: Sequence[Preview]
    trained: Trained | None
    """What is known of the weights; None before the first checkpoint."""
    evaluation: Mapping[str, Any] | None
    """Content of `eval/eval.json`."""
    notes: Sequence[str]
    """Why parts are missing."""

    @property
    def folder(self) -> Path:
        return self.summary.folder

    @property
    def name(self) -> str:
        return self.config.name if self.config else self.folder.resolve().name

    def base_picture(self, number: int) -> Path | None:
        """Return the base's picture of a preview's prompt; None without one."""
        path = self.folder / SAMPLES / f"base-{number}.png"
        return path if preview_recipe(path) is not None else None


def read_run(run: Path) -> RunFiles:
    """Read a run folder in any state. Raises RunError for a folder that holds no run."""
    facts = read_run_file(run)
    if not facts:
        raise RunError(f"{run}: not a run folder: it has no run.json of sd3tune; `sd3tune runs` lists the runs")
    notes: list[str] = []
    config = None
    try:
        config = load_config(run / CONFIG_FILE).config
    except UserError as error:
        notes.append(f"The configuration cannot be read: {error.problems[0]}")
    summary = summarize_run(run)
    return RunFiles(
        summary=summary,
        config=config,
        facts=facts,
        metrics=_lines(notes, lambda: read_metrics(run / METRICS_FILE)),
        validation=_lines(notes, lambda: read_validation(run)),
        evaluations=_lines(notes, lambda: read_evaluations(run)),
        previews=previews_of(run),
        trained=_trained(summary, config, facts) if config else None,
        evaluation=evaluation_of(run),
        notes=notes,
    )


def _lines(notes: list[str], read: Callable[[], list[Line]]) -> list[Line]:
    try:
        return read()
    except RunError as error:
        notes.append(f"A file of measurements cannot be read: {error.problems[0]}")
        return []


def _trained(summary: RunSummary, config: Config, facts: Mapping[str, Any]) -> Trained | None:
    """Return the facts of the final weights, else of the newest checkpoint; None without readable weights."""
    finished = "report" in facts
    if not finished and summary.saved is None:
        return None
    step = None if finished or summary.saved is None else summary.saved
    where = summary.folder if step is None else checkpoint_at(summary.folder, step)
    with contextlib.suppress(UserError, OSError, LookupError, ValueError):
        contract, samples = written_contract(where), last_previews(summary.folder, config.preview.texts)
        return Trained(config, contract, facts, samples, step=step)
    return None

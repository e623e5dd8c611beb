"""Trainings as `sd3tune eval` sees them: likeness, prompts, diversity, drift, and its verdict."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality.drawing import BATCH
from benchmarks.quality.measure import Shares, quietly, train_quietly
from benchmarks.quality.variants import CLASS_IMAGES, PRIOR_KEY, RECIPE, VARIANTS, Variant, own_prediction
from sd3tune.evaluation.measuring import CLASS_SUBJECT, DIVERSITY, PROMPT, SUBJECT
from sd3tune.evaluation.report import Evaluation
from sd3tune.nano.tasks import CLASS_PROMPTS, NAME
from sd3tune.nano.world import CLASS

KINDS = ("good", "overfitted", "underfitted", "undecided")
SEEDS = 2
"""Pictures of each prompt."""
_CAPTIONS_WITHOUT = own_prediction(CLASS_PROMPTS[0], captions_without=NAME)
_OF_VARIANTS = ("prior preservation", "rank", "learning rate")
PROTOCOL = (
    RECIPE,
    *(variant for variant in VARIANTS if variant.group in _OF_VARIANTS),
    Variant("too short", "10 steps", {"train.steps": 10, "checkpoint.every": 10}),
    Variant("too long", "1000 steps", {"train.steps": 1000}),
    Variant("too long", "1000 steps, class images", {"train.steps": 1000, PRIOR_KEY: CLASS_IMAGES}),
    Variant("too long", "1000 steps, captions_without", {"train.steps": 1000, PRIOR_KEY: _CAPTIONS_WITHOUT}),
)


def measure_protocol(variant: Variant, run: Path, store: Path, seed: int) -> Shares:
    """Train, and measure as `sd3tune eval --class shape` does."""
    train_quietly(variant, run, store, seed)
    return evaluated(run, run / "eval")


def evaluated(run: Path, out: Path) -> Shares:
    """Return the means of a run's row, likeness and drift as shares of the way to the photos, and 1 for its verdict."""
    import sd3tune

    with quietly():
        evaluation = sd3tune.evaluate(run, class_word=CLASS, seeds=SEEDS, batch=BATCH, out=out)
    return _figures(evaluation)


def _figures(evaluation: Evaluation) -> Shares:
    rows = {row.kind: {measure: figure for (measure, _), figure in row.figures.items()} for row in evaluation.rows}
    trained, base, photos = rows["trained"], rows["base"], rows["photos"]
    low = base[SUBJECT].interval.mean
    room = photos[SUBJECT].interval.mean - low
    drift = trained[CLASS_SUBJECT].interval.mean - base[CLASS_SUBJECT].interval.mean
    return {
        "likeness": (trained[SUBJECT].interval.mean - low) / room,
        "prompts": trained[PROMPT].interval.mean - base[PROMPT].interval.mean,
        "diversity": trained[DIVERSITY].interval.mean,
        "drift": drift / room,
        **{kind: float(evaluation.verdict.kind == kind) for kind in KINDS},
    }

"""The tables of trainings on nano: what is scored was not preserved, and no conclusion is drawn from chance."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.quality.intervals import differs, half_width, mean_and_half_width
from benchmarks.quality.measure import Panel
from benchmarks.quality.methods import DATA, METHODS, SUBJECTS
from benchmarks.quality.protocol import PROTOCOL
from benchmarks.quality.report import tables
from benchmarks.quality.variants import OTHER_SHAPES, PRIOR_KEY, PRIOR_SHAPES, VARIANTS
from benchmarks.report import environment

SEEDS = range(5)
WORSE = "lora/rank/4"


def prior_prompts(changes) -> set[str]:
    prompts = changes.get(PRIOR_KEY, {}).get("prompt", [])
    return {prompts} if isinstance(prompts, str) else set(prompts)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_prompt_is_both_preserved_and_scored(seed: int) -> None:
    panel = Panel.of(72, seed)
    preserved = set.union(*(prior_prompts(variant.changes) for variant in VARIANTS))
    assert preserved
    assert not preserved & {task.prompt for task in panel.tasks}
    assert {task.scene.thing.shape for task in panel.named} == set(PRIOR_SHAPES)
    assert {task.scene.thing.shape for task in panel.others} == set(OTHER_SHAPES)
    assert not any(shape in prompt for shape in OTHER_SHAPES for prompt in preserved)


def test_a_row_changes_the_learning_rate_or_the_prior() -> None:
    assert not [variant for variant in VARIANTS if {PRIOR_KEY, "optimizer.lr"} <= variant.changes.keys()]


@pytest.mark.parametrize("variants", [VARIANTS, METHODS, DATA, SUBJECTS, PROTOCOL])
def test_every_training_is_a_valid_configuration_with_a_name_of_its_own(variants, tmp_path: Path) -> None:
    for variant in variants:
        config = variant.config(str(tmp_path / "run"), str(tmp_path / "store"), seed=0)
        assert all(Path(source.path).is_dir() for source in config.data.sources), variant.name
    assert len({(variant.group, variant.name) for variant in variants}) == len(variants)


def test_intervals_are_students() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]  # standard error sqrt(2.5 / 5)
    assert half_width(values) == pytest.approx(2.776 * math.sqrt(0.5))
    assert mean_and_half_width(values) == "3.0 +- 2.0"
    assert mean_and_half_width(values[:1], signed=True) == "+1.0"
    assert differs([value + 1 for value in values], [1.0, 2.0, 3.0, 4.0, 5.5])
    assert not differs(values, [1.0, 3.0, 2.0, 5.0, 4.0])
    assert not differs([1.0], [2.0])
    assert not differs([1.0, 2.0], [2.0, 3.0])
    assert differs([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])


def test_only_a_difference_beyond_its_interval_is_marked() -> None:
    base = {"subject": 0.0, "named": 1.0, "others": 1.0, "class_lost": 0.0}
    learned = {"subject": 0.9, "named": 0.6, "others": 0.5, "class_lost": 0.5}
    figures = {f"lora/none/the base/{seed}": base for seed in SEEDS}
    for seed in SEEDS:
        noise = 0.01 * seed
        figures[f"lora/recipe/the demo's/{seed}"] = {**learned, "subject": 0.9 + noise}
        figures[f"{WORSE}/{seed}"] = {**learned, "subject": 0.7 + noise * 0.9, "class_lost": 0.5 + 0.02 * (seed - 2)}
    settings = {"prompts": 72, "sampler steps": 10, "recipe": {"rank": 16}}
    table = tables({"settings": settings, "environment": environment(), "figures": figures})
    (row,) = (line for line in table.splitlines() if line.startswith("| rank | 4 "))
    assert row == "| rank | 4 | 71.8 +- 1.8 * | 40.0 +- 0.0 | 50.0 +- 0.0 | 50.0 +- 3.9 |"
    (base_row,) = (line for line in table.splitlines() if line.startswith("| none "))
    assert base_row == "| none | the base | 0.0 +- 0.0 | 0.0 +- 0.0 | 0.0 +- 0.0 | 0.0 +- 0.0 |"

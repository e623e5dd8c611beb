"""Schedules against those of transformers and torch, step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from pydantic import TypeAdapter

from sd3tune.config.sections.schedule import ScheduleConfig
from sd3tune.training.schedules import SCHEDULES, learning_rate

PEAK, STEPS, WARMUP = 3e-4, 40, 8


def rates(steps: int = STEPS, **settings: Any) -> list[float]:
    schedule = TypeAdapter(ScheduleConfig).validate_python(settings)
    return [learning_rate(schedule, PEAK, step, steps) for step in range(steps)]


def rates_of(make: Any, steps: int = STEPS, **settings: Any) -> list[float]:
    """The rates of a scheduler: `make(optimizer, ...)`."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


THEIRS = {
    "linear": ({}, transformers.get_linear_schedule_with_warmup, {}),
    "polynomial": (
        {"power": 1.5, "last": 0.1},
        transformers.get_polynomial_decay_schedule_with_warmup,
        {"power": 1.5, "lr_end": 0.1 * PEAK},
    ),
    "cosine": ({}, transformers.get_cosine_schedule_with_warmup, {}),
    "cosine_restarts": (
        {"cycles": 4},
        transformers.get_cosine_with_hard_restarts_schedule_with_warmup,
        {"num_cycles": 4},
    ),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_schedules_are_those_of_transformers(kind: str) -> None:
    """Their warm-up begins at 0, ours ends at the peak one step sooner: it is compared by itself."""
    ours, make, theirs = THEIRS[kind]
    expected = rates_of(make, num_warmup_steps=WARMUP, num_training_steps=STEPS, **theirs)
    found = rates(kind=kind, warmup_steps=WARMUP, **ours)
    assert found[WARMUP:] == pytest.approx(expected[WARMUP:], rel=1e-9, abs=1e-15)
    assert found[:WARMUP] == pytest.approx([PEAK * (step + 1) / WARMUP for step in range(WARMUP)])


@pytest.mark.parametrize(("shape", "last"), [("linear", 0.0), ("cosine", 0.25), ("1-sqrt", 0.1)])
def test_warmup_stable_decay_is_that_of_transformers(shape: str, last: float) -> None:
    expected = rates_of(
        transformers.get_wsd_schedule,
        num_warmup_steps=WARMUP, num_decay_steps=8, num_training_steps=STEPS, decay_type=shape, min_lr_ratio=last,
    )  # fmt: skip
    found = rates(kind="warmup_stable_decay", warmup_steps=WARMUP, decay=0.25, shape=shape, last=last)
    assert found[WARMUP:] == pytest.approx(expected[WARMUP:], rel=1e-9, abs=1e-15)
    assert len(set(found[WARMUP : STEPS - 8])) == 1


def test_linear_and_polynomial_are_those_of_torch() -> None:
    linear = rates_of(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.2, total_iters=STEPS)
    assert rates(kind="linear", last=0.2) == pytest.approx(linear, rel=1e-9)
    polynomial = rates_of(torch.optim.lr_scheduler.PolynomialLR, total_iters=STEPS, power=3.0)
    assert rates(kind="polynomial", power=3.0) == pytest.approx(polynomial, rel=1e-9)


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_every_schedule_stays_between_zero_and_the_peak(kind: str) -> None:
    found = rates(7, kind=kind, warmup_steps=2)
    assert found[0] == pytest.approx(PEAK / 2)
    assert found[2] == pytest.approx(PEAK)
    assert all(0 < rate <= PEAK * (1 + 1e-12) and math.isfinite(rate) for rate in found)

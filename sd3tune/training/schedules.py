"""The learning rate of each step: a closed form of its number, so resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from sd3tune.config.sections.schedule import ScheduleSection
from sd3tune.config.variants import SCHEDULE, Registry


def learning_rate(schedule: ScheduleSection, peak: float, step: int, steps: int) -> float:
    """Return the learning rate of step `step` (0-based) of `steps`: a closed form, so resuming needs no state."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / (steps - schedule.warmup_steps)
    return peak * SCHEDULES[schedule.kind](schedule, progress)


def half_cosine(progress: float) -> float:
    """Return (1 + cos(pi progress)) / 2, which falls from 1 to 0 (Loshchilov & Hutter 2017)."""
    return (1 + math.cos(math.pi * progress)) / 2


def _towards(last: float, factor: float) -> float:
    return last + (1 - last) * factor


DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": half_cosine,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""Decays of `warmup_stable_decay`: share of the decay -> factor, from 1 to 0."""

Schedule = Callable[[Any, float], float]
"""(settings of the kind, share of the steps after the warm-up, in [0, 1)) -> factor on the peak learning rate."""

SCHEDULES: Registry[Schedule] = Registry(
    SCHEDULE,
    {
        "constant": lambda settings, progress: 1.0,
        "cosine": lambda settings, progress: half_cosine(progress),
        "linear": lambda settings, progress: _towards(settings.last, 1 - progress),
        "polynomial": lambda settings, progress: _towards(settings.last, (1 - progress) ** settings.power),
        "cosine_restarts": lambda settings, progress: half_cosine(settings.cycles * progress % 1),
        "warmup_stable_decay": lambda settings, progress: _towards(
            settings.last, DECAYS[settings.shape](max(0.0, 1 - (1 - progress) / settings.decay))
        ),
    },
)


def register_schedule(section: type[ScheduleSection], factor: Schedule) -> None:
    """Add a schedule. Raises ValueError for a kind that is already registered.

    A section with `depends_on_length` off promises the same factor for every `progress`, so that a run can be extended.
    """
    SCHEDULES.register(section, factor)

"""The values of a sweep's trials: Optuna's distributions of the axes, and its samplers, seeded for each trial.

What a trial gets is a function of the seed and the trial's number, for TPE also of the trials that had finished. So a
sweep that was killed goes on with the values that it would have had.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from sd3tune.data.seeds import derive
from sd3tune.sweep.settings import Range, Sweep

_SEEDS = 2**32
"""numpy's random numbers, which Optuna uses, take seeds below it."""


def distributions(sweep: Sweep) -> dict[str, BaseDistribution]:
    """Return key -> distribution. Listed values are JSON texts, as Optuna stores numbers and texts only."""
    return {key: _distribution(axis, sweep.sampler == "grid") for key, axis in sweep.space.items()}


def override(key: str, value: Any) -> str:
    """Return `KEY=VALUE` for a value that was drawn from one of the `distributions`."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def make_sampler(sweep: Sweep) -> BaseSampler:
    """Return the sampler of a sweep."""
    if sweep.sampler == "grid":
        return GridInOrder(sweep)
    if sweep.sampler == "random":
        return SeededByTrial(sweep.seed, lambda seed: RandomSampler(seed=seed))
    return SeededByTrial(sweep.seed, lambda seed: TPESampler(seed=seed, constant_liar=True))


def _distribution(axis: list[Any] | Range, in_grid: bool) -> BaseDistribution:
    if isinstance(axis, list) or in_grid:
        return CategoricalDistribution(_texts(axis))
    if axis.is_whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(float(axis.low), float(axis.high), log=axis.log, step=axis.step)


def _texts(axis: list[Any] | Range) -> list[str]:
    return [json.dumps(value, ensure_ascii=False) for value in (axis if isinstance(axis, list) else axis.values)]


class SeededByTrial(BaseSampler):
    """Let a new sampler draw each value, seeded by the sweep's seed, the trial's number and the key.

    A single sampler would continue one stream of random numbers, which ends with its process, and which other
    processes would repeat.
    """

    def __init__(self, seed: int, make: Callable[[int], BaseSampler]) -> None:
        self._seed, self._make = seed, make

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._inner(trial).after_trial(study, trial, state, values)

    def _inner(self, trial: FrozenTrial, key: str = "") -> BaseSampler:
        return self._make(derive(self._seed, "trial", trial.number, key) % _SEEDS)


class GridInOrder(BaseSampler):
    """Give trial N the N-th combination; the last axis changes first. Optuna's own grid goes by what has finished."""

    def __init__(self, sweep: Sweep) -> None:
        texts = [_texts(axis) for axis in sweep.space.values()]
        self._points = [dict(zip(sweep.space, point, strict=True)) for point in itertools.product(*texts)]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._points[trial.number % len(self._points)][param_name]

"""95 % intervals of means over prompts and seeds, by a two-level bootstrap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
_AT_ONCE = 2**22
"""Number of resampled values that are held at once (32 MB)."""


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval; the ends are NaN where fewer than two values are known."""

    mean: float
    low: float
    high: float
    count: int
    """Number of values."""

    def above(self, number: float) -> bool:
        """Return True if the whole interval is above a number; False for unknown ends."""
        return self.low > number

    def below(self, number: float) -> bool:
        """Return True if the whole interval is below a number; False for unknown ends."""
        return self.high < number

    def scaled(self, factor: float) -> Interval:
        """Return the interval of the values times a factor > 0."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor, self.count)


def interval(values: Tensor, *, seed: int = 0, samples: int = 4000) -> Interval:
    """Return the mean over prompts of the means over seeds, with its 95 % percentile bootstrap interval.

    `values` are [prompts, seeds], NaN where one is missing; a prompt without any value is left out. Each of `samples`
    resamples draws prompts with replacement, then for each drawn prompt as many of its known seeds as it has, with
    replacement (Davison and Hinkley 1997, *Bootstrap Methods and their Application*, section 3.8). Below ten prompts it
    is too narrow where prompts differ more than seeds. A function of values, `seed` and `samples` only.
    """
    table = values.detach().cpu().double()
    if table.ndim != 2:
        raise ValueError(f"values of shape {list(table.shape)}; expected [prompts, seeds]")
    table, known = _known_first(table[~table.isnan().all(dim=1)])
    count = int(known.sum())
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float((table.sum(dim=1) / known).mean())
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    draws = _resampled_means(table, known, torch.Generator().manual_seed(seed), samples)
    tail = (1 - LEVEL) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(mean, low, high, count)


def paired(first: Tensor, second: Tensor, *, seed: int = 0, samples: int = 4000) -> Interval:
    """Return the interval of `first - second`, two tables [prompts, seeds] with the same prompts and seeds.

    A value that is missing in either is left out. See `interval`.
    """
    if first.shape != second.shape:
        raise ValueError(f"tables of shapes {list(first.shape)} and {list(second.shape)} cannot be paired")
    return interval(first.detach().cpu().double() - second.detach().cpu().double(), seed=seed, samples=samples)


def share(value: float, floor: float, ceiling: float) -> float:
    """Return `value` as a share: 0 at the floor (the base), 1 at the ceiling (the photos); NaN without room between."""
    return (value - floor) / (ceiling - floor) if ceiling > floor else math.nan


def _known_first(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the table with each prompt's missing values last and zero, and the number of known values of each."""
    missing = table.isnan()
    order = missing.to(torch.uint8).argsort(dim=1, stable=True)
    return table.nan_to_num(0).gather(1, order), (~missing).sum(dim=1)


def _resampled_means(table: Tensor, known: Tensor, generator: torch.Generator, samples: int) -> Tensor:
    """Return the mean of each resample: [samples] float64."""
    prompts, seeds = table.shape
    step = max(1, _AT_ONCE // (prompts * seeds))
    means = []
    for start in range(0, samples, step):
        size = min(step, samples - start)
        drawn = torch.randint(prompts, (size, prompts), generator=generator)
        counts = known[drawn][..., None]
        places = torch.rand(size, prompts, seeds, generator=generator, dtype=torch.float64)
        places = (places * counts).long().clamp(max=counts - 1)
        picked = table[drawn].gather(2, places)
        used = torch.arange(seeds) < counts  # as many as the prompt has
        means.append(((picked * used).sum(dim=2) / counts[..., 0]).mean(dim=1))
    return torch.cat(means)

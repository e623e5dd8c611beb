"""Intervals: means and quantiles against numpy, coverage on known data, and missing values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sd3tune.measures.intervals import Interval, interval, paired, share

NAN = math.nan


def table(prompts: int, seeds: int, between: float, within: float, seed: int) -> Tensor:
    """Return values of mean zero, with deviations between prompts and between the seeds of a prompt."""
    drawn = torch.Generator().manual_seed(seed)
    prompt = between * torch.randn(prompts, 1, generator=drawn, dtype=torch.float64)
    return prompt + within * torch.randn(prompts, seeds, generator=drawn, dtype=torch.float64)


def resampled(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Return bootstrap means by plain loops, with numpy's random numbers."""
    drawn = np.random.default_rng(seed)
    rows = [row[~np.isnan(row)] for row in values]
    rows = [row for row in rows if len(row)]
    means = []
    for _ in range(samples):
        picks = [rows[number] for number in drawn.integers(len(rows), size=len(rows))]
        means.append(np.mean([drawn.choice(row, len(row)).mean() for row in picks]))
    return np.array(means)


def test_the_interval_is_the_two_level_bootstraps() -> None:
    values = 10 + table(8, 3, 1.0, 0.5, seed=1)  # so that a missing value taken as 0 would show
    values[2, 1] = values[5] = NAN
    found = interval(values, samples=20_000)
    low, high = np.quantile(resampled(values.numpy(), 20_000, seed=0), [0.025, 0.975])
    assert found.mean == pytest.approx(
        np.nanmean([np.nanmean(row) for row in values.numpy() if not np.isnan(row).all()])
    )
    assert found.count == 20
    assert found.low == pytest.approx(low, abs=0.03)  # five standard errors of a quantile of 20,000
    assert found.high == pytest.approx(high, abs=0.03)


@pytest.mark.parametrize(("prompts", "seeds", "between"), [(25, 4, 1.0), (25, 4, 0.0), (25, 1, 1.0), (10, 4, 0.5)])
def test_the_interval_covers_the_true_mean_as_often_as_stated(prompts: int, seeds: int, between: float) -> None:
    found = [interval(table(prompts, seeds, between, 1.0, seed), samples=400) for seed in range(300)]
    covered = sum(one.low <= 0 <= one.high for one in found) / len(found)
    assert 0.91 <= covered <= 0.995


def test_pairing_removes_what_two_rows_share() -> None:
    shared, noise = table(12, 4, 1.0, 1.0, 0), table(12, 4, 0.0, 0.05, 1)
    difference = paired(shared + 0.1 + noise, shared)
    assert difference.low > 0.05
    assert difference.high < 0.15
    apart = interval(shared)
    assert difference.high - difference.low < (apart.high - apart.low) / 5
    assert paired(shared, shared) == Interval(0, 0, 0, 48)


def test_a_value_missing_in_either_row_is_left_out_of_the_pairs() -> None:
    first, second = torch.tensor([[1.0, 2.0], [NAN, 5.0]]), torch.tensor([[0.0, NAN], [3.0, 3.0]])
    assert paired(first, second).mean == pytest.approx(1.5)
    assert paired(first, second).count == 2


def test_the_same_values_give_the_same_interval() -> None:
    values = table(5, 4, 1.0, 1.0, 3)
    before = torch.random.get_rng_state()
    assert interval(values) == interval(values.float().double() * 0 + values)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert interval(values, seed=1) != interval(values)


def test_many_values_are_resampled_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values = table(6, 4, 1.0, 1.0, 3)
    whole = interval(values, samples=500)
    monkeypatch.setattr("sd3tune.measures.intervals._AT_ONCE", 24 * 100)
    parts = interval(values, samples=500)
    assert parts.mean == whole.mean
    assert parts.low == pytest.approx(whole.low, abs=0.15)  # other random numbers


def test_one_value_or_none_has_no_interval() -> None:
    one = interval(torch.tensor([[0.5, NAN]]))
    assert (one.mean, one.count) == (0.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert not one.above(-9)
    assert not one.below(9)
    assert interval(torch.full((2, 2), NAN)).count == 0


def test_seeds_alone_make_an_interval_for_one_prompt() -> None:
    found = interval(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    assert 0.1 <= found.low < found.mean < found.high <= 0.4


@pytest.mark.parametrize("values", [torch.zeros(3), torch.zeros(1, 2, 3)])
def test_other_shapes_are_refused(values: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \[prompts, seeds\]"):
        interval(values)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired(torch.zeros(2, 2), torch.zeros(2, 3))


def test_a_share_is_zero_at_the_floor_and_one_at_the_ceiling() -> None:
    assert share(0.4, 0.4, 0.8) == 0
    assert share(0.8, 0.4, 0.8) == 1
    assert share(0.7, 0.4, 0.8) == pytest.approx(0.75)
    assert math.isnan(share(0.5, 0.8, 0.8))

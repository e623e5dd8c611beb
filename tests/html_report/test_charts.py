"""Curves keep their shape when they are made shorter."""

from __future__ import annotations

import pytest

from sd3tune.html_report.charts import MOST_POINTS, by_sigma, smoothed, thinned


def test_long_curves_are_averaged_to_a_fixed_length() -> None:
    points = [(step, float(step % 2)) for step in range(1, 100_001)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept[-1][0] == 100_000
    assert all(value == 0.5 for _, value in kept)
    assert thinned(points[:3]) == points[:3]


def test_a_smoothed_curve_starts_at_its_first_value_and_ends_near_a_constant() -> None:
    curve = smoothed([(1, None), (2, 4.0), *((step, 1.0) for step in range(3, 203))])
    assert curve[0] == (1, None)
    assert curve[1] == (2, pytest.approx(4.0))
    assert curve[-1][1] == pytest.approx(1.0, abs=1e-6)


def test_the_loss_by_sigma_is_the_change_against_the_base() -> None:
    line = {
        "step": 5,
        "loss_by_sigma": {"0.0-0.2": 0.9, "0.2-0.4": None},
        "base_loss_by_sigma": {"0.0-0.2": 1.0, "0.2-0.4": 1.0},
    }
    first, second = by_sigma([line])
    assert (first["label"], first["x"], first["y"]) == ("sigma 0.0-0.2", [5], [-10.0])
    assert second["y"] == [None]

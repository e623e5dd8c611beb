"""The sigmas of a run in words: numbers that were derived elsewhere, and bars that fit them."""

from __future__ import annotations

from typing import Any

import pytest

from sd3tune.config.sections.flow import FlowConfig
from sd3tune.jobs.sigmas import describe_sigmas


def described(in_force: float, **settings: Any) -> str:
    return describe_sigmas(FlowConfig.model_validate(settings), in_force)


@pytest.mark.parametrize(
    ("settings", "shift", "words"),
    [  # Medians: shift / (1 + shift) for a symmetric density. Above 0.9: see tests/flow, 13.6 %, 25 %, 1.4 %.
        # Below 0.1 at shift 3, logit-normal: Phi(logit(0.1) - ln 3) = Phi(-3.296) = 0.05 %.
        ({}, 3.0, "logit_normal, shift 3: half of the samples above 0.75, 14 % above 0.9, under 1 % below 0.1"),
        ({}, 1.0, "logit_normal, shift 1: half of the samples above 0.5, 1 % above 0.9, 1 % below 0.1"),
        ({"timesteps": {"kind": "uniform"}}, 3.0,
         "uniform, shift 3: half of the samples above 0.75, 25 % above 0.9, 4 % below 0.1"),  # 0.1 / 2.8 = 3.6 %
        ({"timesteps": {"kind": "uniform"}}, 1.0,
         "uniform, shift 1: half of the samples above 0.5, 10 % above 0.9, 10 % below 0.1  |█████|"),
        ({"timesteps": {"kind": "uniform"}, "min_sigma": 0.2, "max_sigma": 0.8}, 1.0,
         "uniform, shift 1, from 0.2 to 0.8: half of the samples above 0.5, 0 % above 0.9, 0 % below 0.1  | ███ |"),
        ({"shift": "resolution"}, 1.5, "logit_normal, shift 1.5 by resolution: half of the samples above 0.6,"),
    ],
)  # fmt: skip
def test_the_line_says_where_the_samples_lie(settings: dict[str, Any], shift: float, words: str) -> None:
    assert described(shift, **settings).startswith(words)


def test_the_bars_rise_towards_noise_with_the_shift() -> None:
    bars = described(3.0).partition("|")[2].rstrip("|")
    assert len(bars) == 5
    assert bars[-1] == "█"
    assert list(bars) == sorted(bars)

"""The sigmas of a run in words: numbers that were derived elsewhere, and bars that fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sd3tune.config.sections.flow import FlowConfig
from sd3tune.errors import ConfigError
from sd3tune.run.preflight import make_plan
from sd3tune.run.sigmas import describe_sigmas


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


@pytest.mark.parametrize(
    "bounds", [("flow.min_sigma=0.9999", "flow.shift=3.0"), ("flow.max_sigma=1e-4",), ("flow.max_sigma=0.002",)]
)
def test_bounds_that_hardly_a_sigma_reaches_are_refused(quick_config, tmp_path: Path, bounds: tuple[str, ...]) -> None:
    """Logit-normal: P(sigma < 0.002) = Phi(logit(0.002)) = Phi(-6.2), below 1e-9; rounding would leave one value."""
    with pytest.raises(ConfigError, match=r"flow\.min_sigma .* draws almost nothing between them"):
        make_plan(quick_config(tmp_path, *bounds), torch.device("cpu"), None)
    wide = make_plan(quick_config(tmp_path, *bounds, "flow.timesteps.kind=uniform"), torch.device("cpu"), None)
    assert wide.shift in (1.0, 3.0)

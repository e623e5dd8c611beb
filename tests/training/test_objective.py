"""From the configuration to functions: every variant is reachable, normalised where it should be, and in its bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from sd3tune.config.sections.flow import FlowConfig
from sd3tune.flow.objective import pseudo_huber_loss
from sd3tune.training.objective import DENSITIES, LOSSES, WEIGHTS, make_objective, make_weight, shift_at, sigma_of_u

U = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)


def flow(**settings: Any) -> FlowConfig:
    return FlowConfig.model_validate(settings)


def kinds(field: str) -> set[str]:
    """The kinds of a section of the schema."""
    schema = TypeAdapter(FlowConfig).json_schema()
    return set(schema["properties"][field]["discriminator"]["mapping"])


def test_every_kind_of_the_schema_has_its_function() -> None:
    assert set(DENSITIES) == kinds("timesteps")
    assert set(WEIGHTS) == kinds("weighting")
    assert set(LOSSES) == kinds("loss")


@pytest.mark.parametrize("timesteps", DENSITIES)
@pytest.mark.parametrize("weighting", sorted(set(WEIGHTS) - {"sigma_sqrt"}))
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.1, 0.8)])
def test_weights_have_mean_one_under_the_sigmas_in_training(timesteps, weighting, bounds) -> None:
    if timesteps == weighting == "cosmap":
        return
    low, high = bounds
    settings = flow(timesteps={"kind": timesteps}, weighting={"kind": weighting}, min_sigma=low, max_sigma=high)
    sigma = sigma_of_u(settings, 3.0)(U)
    assert low - 1e-9 <= sigma.min()
    assert sigma.max() <= high + 1e-9
    assert make_weight(settings, 3.0)(sigma).mean().item() == pytest.approx(1, rel=1e-5)


def test_sigma_sqrt_is_left_as_it_is() -> None:
    weight = make_weight(flow(weighting={"kind": "sigma_sqrt"}), 3.0)
    assert weight(torch.tensor([0.5, 1.0])).tolist() == [4.0, 1.0]


def test_losses_follow_their_settings() -> None:
    prediction, target, sigma = torch.full((1, 1, 2, 2), 3.0), torch.zeros(1, 1, 2, 2), torch.tensor([0.5])

    def loss(**settings: Any) -> list[float]:
        return make_objective(flow(loss=settings), 1.0).loss(prediction, target, sigma, 0.25).tolist()

    assert loss(kind="mse") == [9.0]
    assert loss(kind="absolute") == [3.0]
    assert loss(kind="huber", delta=2.0) == [2 * (3 - 1)]
    assert loss(kind="pseudo_huber", delta=4.0) == [16 * (math.sqrt(1 + 9 / 16) - 1)]


@pytest.mark.parametrize(("over", "delta"), [("sigma", [2.0, 1.0, 0.5]), ("steps", [1.0, 1.0, 1.0])])
def test_delta_follows_sigma_or_the_steps(over, delta) -> None:
    """From 2 to 1/2 by equal factors: half-way it is 1."""
    settings = flow(loss={"kind": "pseudo_huber", "delta": 2.0, "last_delta": 0.5, "over": over})
    prediction, target = torch.randn(2, 3, 4, 8, 8)
    sigma = torch.tensor([0.0, 0.5, 1.0])
    found = make_objective(settings, 1.0).loss(prediction, target, sigma, 0.5)
    torch.testing.assert_close(found, pseudo_huber_loss(prediction, target, torch.tensor(delta)))
    assert settings.loss.depends_on_length == (over == "steps")


def test_a_mixture_draws_by_its_settings() -> None:
    uniform, low = {"kind": "uniform"}, {"kind": "logit_normal", "mean": -3.0, "std": 0.1}
    even, mostly = (flow(timesteps={"kind": "mixture", "parts": [uniform, low], "shares": s}) for s in (None, [1, 9]))
    shares = [(sigma_of_u(settings, 1.0)(U) < 0.1).double().mean().item() for settings in (even, mostly)]
    assert shares == pytest.approx([0.5 * (1 + 0.1), 0.9 + 0.1 * 0.1], abs=1e-4)
    with pytest.raises(ValueError, match="shares has length 1 and parts 2"):
        flow(timesteps={"kind": "mixture", "parts": [uniform, low], "shares": [1]})


def test_the_shift_is_the_models_a_number_or_by_resolution() -> None:
    for pixels in (512**2, 1024**2):
        assert shift_at(flow(), 3.0, pixels) == 3.0
        assert shift_at(flow(shift=2.0), 3.0, pixels) == 2.0
    assert shift_at(flow(shift="resolution"), 3.0, 1024**2) == 3.0
    assert shift_at(flow(shift="resolution"), 3.0, 512**2) == 1.5
    assert shift_at(flow(shift="resolution"), 3.0, 1536 * 1024) == pytest.approx(3 * math.sqrt(1.5))

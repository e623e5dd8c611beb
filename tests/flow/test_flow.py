"""Each function against its closed form in float64, and the loss against diffusers' own scheduler."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd3tune.flow import objective, timesteps, weighting

U = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5), (-0.7, 2.0)])
def test_logit_normal_has_the_cdf_of_its_name(mean, std):
    sigma = timesteps.logit_normal(U, mean, std)
    for threshold in (0.1, 0.5, 0.9):
        z = (math.log(threshold / (1 - threshold)) - mean) / std
        expected = 0.5 * (1 + math.erf(z / math.sqrt(2)))  # Phi, from the standard library
        assert (sigma < threshold).double().mean().item() == pytest.approx(expected, abs=2e-5)


def test_positive_mean_means_more_noise():
    assert timesteps.logit_normal(U, 1.0, 1.0).mean() > timesteps.logit_normal(U, 0.0, 1.0).mean() + 0.1


@pytest.mark.parametrize(
    ("draw", "shift", "share"),
    [  # shares above sigma 0.9 derived by hand: P(s > c/(shift - (shift-1)c)), c = 0.9
        (lambda u: timesteps.logit_normal(u, 0.0, 1.0), 1.0, 0.5 * math.erfc(math.log(9) / math.sqrt(2))),
        (lambda u: timesteps.logit_normal(u, 0.0, 1.0), 3.0, 0.5 * math.erfc(math.log(3) / math.sqrt(2))),
        (timesteps.uniform, 1.0, 0.1),
        (timesteps.uniform, 3.0, 0.25),
    ],
)
def test_share_of_samples_near_pure_noise(draw, shift, share):
    sigma = timesteps.shift_sigma(draw(U), shift)
    assert (sigma > 0.9).double().mean().item() == pytest.approx(share, abs=2e-5)


@given(st.floats(0, 1), st.floats(0.1, 20))
def test_shift_multiplies_the_odds_of_noise(sigma, shift):
    shifted = timesteps.shift_sigma(torch.tensor(sigma, dtype=torch.float64), shift).item()
    assert shifted * (1 - sigma) == pytest.approx(shift * sigma * (1 - shifted), abs=1e-12)


def test_shift_is_that_of_the_diffusers_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    assert torch.allclose(scheduler.sigmas.double(), timesteps.shift_sigma(plain, 3.0), atol=1e-6)


def test_interpolation_runs_from_data_to_noise():
    latents, noise = torch.randn(2, 4, 16, 8, 8, dtype=torch.float64)
    assert torch.equal(objective.interpolate(latents, noise, torch.zeros(4).double()), latents)
    assert torch.equal(objective.interpolate(latents, noise, torch.ones(4).double()), noise)


def test_velocity_is_the_derivative_of_the_interpolation():
    latents, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    h = 1e-6
    ahead, behind = (objective.interpolate(latents, noise, sigma + d) for d in (h, -h))
    assert torch.allclose((ahead - behind) / (2 * h), objective.velocity_target(latents, noise), atol=1e-8)


def test_a_perfect_euler_step_along_the_velocity_returns_the_data():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    latents, noise = torch.randn(2, 1, 16, 8, 8)
    sample = noise
    for t in scheduler.timesteps:
        sample = scheduler.step(objective.velocity_target(latents, noise), t, sample, return_dict=False)[0]
    assert torch.allclose(sample, latents, atol=1e-5)


def test_loss_equals_the_diffusers_computation():
    """Noising by the scheduler's own `scale_noise`, the loss as in the example scripts without preconditioning."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    generator = torch.Generator().manual_seed(0)
    latents, noise, prediction = torch.randn(3, 4, 16, 8, 8, generator=generator)
    indices = torch.tensor([10, 300, 600, 990])
    sigma = scheduler.sigmas[indices]
    noisy = scheduler.scale_noise(latents, scheduler.timesteps[indices], noise)
    assert torch.allclose(objective.interpolate(latents, noise, sigma), noisy, atol=1e-6)
    assert torch.allclose(objective.model_timestep(sigma), scheduler.timesteps[indices])
    reference = torch.mean((prediction.float() - (noise - latents).float()) ** 2)
    ours = objective.velocity_loss(prediction, objective.velocity_target(latents, noise)).mean()
    assert ours.item() == pytest.approx(reference.item(), rel=1e-6)


def test_loss_is_fp32_for_a_bf16_prediction_and_never_mixes_samples():
    target = torch.randn(3, 16, 8, 8)
    prediction = target.clone().bfloat16()
    prediction[1] += 1
    loss = objective.velocity_loss(prediction, target)
    assert loss.dtype is torch.float32
    assert loss.shape == (3,)
    assert loss[1] > 0.9
    assert loss[[0, 2]].max() < 1e-4


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_equals_sigma_squared_times_the_clamped_snr(gamma):
    sigma = torch.linspace(0.01, 0.999, 500, dtype=torch.float64)
    snr = ((1 - sigma) / sigma) ** 2
    assert torch.allclose(weighting.min_snr(sigma, gamma), sigma**2 * snr.clamp(max=gamma), rtol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_mean_weight_equals_the_integral_done_by_hand(gamma):
    knee = 1 / (1 + math.sqrt(gamma))  # (1-s)^2 = gamma s^2
    expected = gamma * knee**3 / 3 + (1 - knee) ** 3 / 3
    mean = weighting.mean_over_sigma(lambda s: weighting.min_snr(s, gamma), timesteps.uniform)
    assert mean == pytest.approx(expected, rel=1e-8)


def test_mean_weight_follows_the_density_and_the_shift():
    generator = torch.Generator().manual_seed(1)
    n = torch.randn(2_000_000, generator=generator, dtype=torch.float64)
    sigma = timesteps.shift_sigma(torch.sigmoid(0.3 + 0.8 * n), 3.0)
    sampled = weighting.min_snr(sigma, 5.0).mean().item()
    mean = weighting.mean_over_sigma(
        lambda s: weighting.min_snr(s, 5.0),
        lambda u: timesteps.shift_sigma(timesteps.logit_normal(u, 0.3, 0.8), 3.0),
    )
    assert mean == pytest.approx(sampled, rel=2e-3)

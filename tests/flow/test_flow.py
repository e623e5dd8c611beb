"""Each function against its closed form in float64, and the loss against diffusers' own scheduler."""

import math

import mpmath  # comes with torch
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


def paper_mode(u: torch.Tensor, s: float) -> torch.Tensor:
    """Esser et al. 2024, eq. 20, as printed; t = 1 is noise there, too."""
    return 1 - u - s * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 1.29, 1.75])
def test_mode_is_the_papers_map_turned_to_rise(scale):
    sigma = timesteps.mode(U, scale)
    assert torch.allclose(sigma, paper_mode(1 - U, scale), atol=1e-15)
    assert torch.allclose(sigma.sort().values, paper_mode(U, scale).sort().values, atol=1e-14)
    assert (sigma.diff() > 0).all()
    assert timesteps.mode(torch.tensor([0.0, 0.5, 1.0]).double(), scale).tolist() == pytest.approx([0, 0.5, 1])


def test_mode_favours_the_middle_above_zero_and_the_ends_below():
    """Density at sigma 1/2: 1 / f'(1/2), f' = 1 + s (1 - (pi / 2) sin(pi u))."""
    for scale in (-0.5, 1.29):
        share = ((timesteps.mode(U, scale) - 0.5).abs() < 0.005).double().mean().item()
        assert share / 0.01 == pytest.approx(1 / (1 + scale * (1 - math.pi / 2)), rel=1e-2)


def test_cosmap_has_the_papers_map_and_density():
    sigma = timesteps.cosmap(U)
    assert torch.allclose(sigma, 1 - 1 / (torch.tan(math.pi / 2 * U) + 1), atol=1e-12)
    for threshold in (0.05, 0.3, 0.8):  # the density 2 / (pi (1 - 2 t + 2 t^2)) integrated by hand
        cdf = (2 / math.pi) * (math.atan(2 * threshold - 1) + math.pi / 4)
        assert (sigma < threshold).double().mean().item() == pytest.approx(cdf, abs=2e-5)
    assert timesteps.cosmap(torch.tensor(1.0).double()).item() == 1.0


def test_cosmap_weighting_is_the_density_of_cosmap_timesteps():
    """So weighting uniform sigmas by it, and drawing from it, give the same mean of any function."""
    for function in (torch.square, torch.sin):
        drawn = function(timesteps.cosmap(U)).mean().item()
        weighted = (weighting.cosmap(U) * function(U)).mean().item()
        assert weighted == pytest.approx(drawn, rel=1e-8)
    assert weighting.mean_over_sigma(weighting.cosmap, timesteps.uniform) == pytest.approx(1, rel=1e-9)
    assert weighting.cosmap(torch.tensor(0.5).double()).item() == pytest.approx(4 / math.pi)


def test_sigma_sqrt_is_sigma_to_minus_two_until_its_clamp():
    sigma = torch.tensor([0.0, 1e-4, 1e-3, 0.1, 0.5, 1.0], dtype=torch.float64)
    expected = torch.tensor([1e6, 1e6, 1e6, 100, 4, 1], dtype=torch.float64)
    assert torch.allclose(weighting.sigma_sqrt(sigma), expected, rtol=1e-12)
    # By hand: 1e6 * 1e-3 + (1 / 1e-3 - 1); the midpoint rule is exact where the weight is constant.
    assert weighting.mean_over_sigma(weighting.sigma_sqrt, timesteps.uniform) == pytest.approx(1999, rel=1e-4)


@pytest.mark.parametrize(("shift", "mean"), [(1.0, 11.69), (3.0, 2.92), (6.0, 1.755)])
def test_the_mean_of_sigma_sqrt_is_finite_under_a_logit_normal(shift, mean):
    def sigma_of_u(u):
        return timesteps.shift_sigma(timesteps.logit_normal(u, 0.0, 1.0), shift)

    m = math.log(shift)
    assert 1 + 2 * math.exp(-m + 0.5) + math.exp(-2 * m + 2) == pytest.approx(mean, rel=1e-3)
    assert weighting.mean_over_sigma(weighting.sigma_sqrt, sigma_of_u) == pytest.approx(mean, rel=2e-3)


DENSITIES = {
    "uniform": timesteps.uniform,
    "logit_normal": lambda u: timesteps.logit_normal(u, 0.4, 1.3),
    "mode": lambda u: timesteps.mode(u, 1.29),
    "cosmap": timesteps.cosmap,
    "shifted": lambda u: timesteps.shift_sigma(timesteps.logit_normal(u, 0.0, 1.0), 3.0),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_truncation_keeps_the_density_between_its_bounds(name):
    draw, low, high = DENSITIES[name], 0.2, 0.7
    truncated = timesteps.truncated(draw, low, high)(U)
    plain = draw(U)
    inside = plain[(plain > low) & (plain < high)]
    assert truncated.min() >= low - 1e-9
    assert truncated.max() <= high + 1e-9
    for threshold in (0.3, 0.45, 0.6):
        expected = (inside < threshold).double().mean().item()
        assert (truncated < threshold).double().mean().item() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("name", DENSITIES)
def test_no_bounds_change_no_bit(name):
    assert torch.equal(timesteps.truncated(DENSITIES[name], 0.0, 1.0)(U), DENSITIES[name](U))


@pytest.mark.parametrize("sigma", [0.001, 0.3, 0.75, 0.999])
def test_the_share_below_a_sigma_inverts_the_draw(sigma):
    for draw in DENSITIES.values():
        u = torch.tensor(timesteps.share_below(draw, sigma), dtype=torch.float64)
        assert draw(u).item() == pytest.approx(sigma, abs=2e-8)  # ndtri is no better in its tails
    assert timesteps.share_below(timesteps.uniform, sigma) == pytest.approx(sigma, rel=1e-15)


def test_the_resolution_shift_keeps_the_uncertainty_of_the_image():
    """Esser et al. 2024, section 5.3.2: sigma(t, n) = t / (1 - t) sqrt(1 / n) is the same at t_m for m pixels."""
    n, m = 1024**2, 512 * 768
    t_n = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    t_m = timesteps.shift_sigma(t_n, timesteps.resolution_shift(m, n))
    assert torch.allclose(t_m / (1 - t_m) / math.sqrt(m), t_n / (1 - t_n) / math.sqrt(n), rtol=1e-12)
    assert timesteps.resolution_shift(n, n) == 1
    assert timesteps.resolution_shift(512**2, n) == 0.5  # a quarter of the pixels, half the odds of noise


@pytest.mark.parametrize("delta", [0.1, 1.0, 5.0])
def test_huber_is_half_the_square_near_zero_and_a_line_beyond(delta):
    target = torch.randn(3, 16, 8, 8, dtype=torch.float64)
    d = 2 * torch.randn(3, 16, 8, 8, dtype=torch.float64)
    by_hand = torch.where(d.abs() < delta, d**2 / 2, delta * (d.abs() - delta / 2)).mean(dim=(1, 2, 3))
    assert torch.allclose(objective.huber_loss(target + d, target, delta), by_hand, rtol=1e-12)
    assert objective.huber_loss(target.bfloat16(), target.float(), delta).dtype is torch.float32


def drawn_share(loss, steps=300):
    """How often the flow of the loss' exact optimum draws the rare kind of pictures, 20 % of them.

    They are 2 and the others -0.5, of variance 1 together. At x and sigma the velocity of a kind z is (x - z) / sigma.
    """
    kinds, chances = torch.tensor([2.0, -0.5]).double(), torch.tensor([0.2, 0.8]).double()
    x = torch.special.ndtri((torch.arange(1001).double() + 0.5) / 1001)
    for step in range(steps):
        sigma = 1 - step / steps
        away = x[:, None] - (1 - sigma) * kinds
        weights = (chances.log() - (away / sigma) ** 2 / 2).softmax(-1)
        targets = (x[:, None] - kinds) / sigma
        low, high = targets.min(1).values, targets.max(1).values
        for _ in range(30):  # the slope of the mean loss rises through 0 at the optimum
            velocity = ((low + high) / 2).requires_grad_()
            losses = loss(velocity.repeat(2)[:, None], targets.T.flatten()[:, None]).reshape(2, -1).T
            (slope,) = torch.autograd.grad((weights * losses).sum(), velocity)
            middle = velocity.detach()
            low, high = torch.where(slope > 0, low, middle), torch.where(slope > 0, middle, high)
        x = x - (low + high) / 2 / steps
    return (x > 0.75).double().mean().item()


@pytest.mark.parametrize(("delta", "share"), [(0.5, 0.07), (1.0, 0.09), (2.0, 0.16)])
def test_the_optimum_of_huber_draws_a_rare_kind_too_rarely(delta, share):
    found = drawn_share(lambda prediction, target: objective.huber_loss(prediction, target, delta))
    assert found == pytest.approx(share, abs=0.02)


def test_the_optimum_of_the_squared_error_draws_a_rare_kind_as_often_as_it_occurs():
    assert drawn_share(objective.velocity_loss) == pytest.approx(0.2, abs=0.01)


def test_huber_with_a_large_delta_is_half_the_squared_error():
    prediction, target = torch.randn(2, 3, 16, 8, 8, dtype=torch.float64)
    half = objective.velocity_loss(prediction, target) / 2
    assert torch.allclose(objective.huber_loss(prediction, target, 1e3), half, rtol=1e-12)


def test_offset_noise_moves_each_channel_as_a_whole():
    noise, offset = torch.randn(2, 16, 8, 8), torch.randn(2, 16)
    moved = objective.offset_noise(noise, offset, 0.1) - noise
    assert torch.allclose(moved, (0.1 * offset)[:, :, None, None].expand_as(noise), atol=1e-6)


def test_absolute_is_the_mean_distance_and_its_optimum_the_median():
    prediction, target = torch.randn(2, 3, 16, 8, 8, dtype=torch.float64)
    assert torch.allclose(objective.absolute_loss(prediction, target), (prediction - target).abs().mean((1, 2, 3)))
    assert drawn_share(objective.absolute_loss, steps=60) < 0.08


@pytest.mark.parametrize("delta", [1e-3, 0.5, 3.0, 1e4])
def test_pseudo_huber_is_its_formula_without_cancellation(delta):
    d = 2 * torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.zeros_like(d)
    by_hand = [
        sum(mpmath.mpf(delta) ** 2 * (mpmath.sqrt(1 + (mpmath.mpf(x) / delta) ** 2) - 1) for x in row) / len(row)
        for row in d.flatten(1).tolist()
    ]
    expected = torch.tensor([float(value) for value in by_hand], dtype=torch.float64)
    deltas = torch.tensor([delta], dtype=torch.float64)
    assert torch.allclose(objective.pseudo_huber_loss(d, target, deltas), expected, rtol=1e-13)
    single = objective.pseudo_huber_loss(d.bfloat16(), target.float(), deltas)
    assert single.dtype is torch.float32
    assert torch.allclose(single.double(), expected, rtol=2e-2)


def test_pseudo_huber_takes_a_delta_per_sample():
    prediction, target = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    deltas = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    together = objective.pseudo_huber_loss(prediction, target, deltas)
    apart = [objective.pseudo_huber_loss(prediction[i : i + 1], target[i : i + 1], deltas[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(apart))
    assert torch.allclose(  # half the square for a large delta, as Huber's
        objective.pseudo_huber_loss(prediction, target, torch.tensor([1e6]).double()),
        objective.velocity_loss(prediction, target) / 2,
    )


def test_between_takes_equal_factors():
    progress = torch.tensor([0.0, 0.5, 1.0]).double()
    assert objective.between(1.0, 0.01, progress).tolist() == pytest.approx([1.0, 0.1, 0.01], rel=1e-12)


@pytest.mark.parametrize(("delta", "low", "high"), [(0.1, 0.0, 0.09), (1.0, 0.09, 0.17), (100.0, 0.19, 0.21)])
def test_the_optimum_of_pseudo_huber_lies_between_median_and_mean(delta, low, high):
    deltas = torch.tensor([delta]).double()
    found = drawn_share(lambda prediction, target: objective.pseudo_huber_loss(prediction, target, deltas), steps=60)
    assert low < found < high


@pytest.mark.parametrize(("a", "b"), [(2.0, 2.0), (0.5, 0.5), (5.0, 1.5), (1.0, 1.0), (0.05, 3.0), (100.0, 40.0)])
def test_beta_inverts_the_regularised_incomplete_beta_function(a, b):
    """The CDF from mpmath, on both sides of the drawn sigma: so far off it may be."""
    u = torch.linspace(0.001, 0.999, 41, dtype=torch.float64)
    slack = 1e-7 * max(a, b, 1)
    for share, sigma in zip(u.tolist(), timesteps.beta(u, a, b).tolist(), strict=True):
        low, high = (
            mpmath.betainc(a, b, 0, min(max(x, 0), 1), regularized=True) for x in (sigma - slack, sigma + slack)
        )
        assert low <= share <= high


def test_beta_reaches_both_ends_and_rises():
    sigma = timesteps.beta(torch.linspace(0, 1, 10001, dtype=torch.float64), 2.0, 3.0)
    assert 0 <= sigma[0] < 1e-6
    assert 1 - 1e-4 < sigma[-1] <= 1
    assert (sigma.diff() > 0).all()
    assert sigma.mean().item() == pytest.approx(2 / 5, abs=1e-4)


def test_a_mixture_has_the_shares_of_its_parts_below_every_sigma():
    sigma = timesteps.mixture([lambda u: timesteps.logit_normal(u, 1.0, 0.5), timesteps.uniform], [1.0, 3.0])(U)
    for threshold in (0.1, 0.5, 0.75, 0.9):
        z = (math.log(threshold / (1 - threshold)) - 1) / 0.5
        cdf = 0.25 * 0.5 * (1 + math.erf(z / math.sqrt(2))) + 0.75 * threshold
        assert (sigma < threshold).double().mean().item() == pytest.approx(cdf, abs=2e-5)
    assert (sigma.diff() > 0).all()


def test_a_mixture_of_one_density_with_itself_is_that_density():
    def draw(u):
        return timesteps.logit_normal(u, 0.4, 1.3)

    assert torch.allclose(timesteps.mixture([draw, draw], [1.0, 2.0])(U), draw(U), atol=1e-7)

"""FID and KID against closed forms and the definitions written out, in float64."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from sd3tune.errors import MeasureUnavailable
from sd3tune.measures.distribution import FID_NEEDS, fid, kid, too_few


def normal(count: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, size))


def with_moments(rows: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> Tensor:
    """Return rows whose sample mean and unbiased covariance are exactly these."""
    white = rows - rows.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def spd(size: int, seed: int) -> np.ndarray:
    factor = normal(size, 2 * size, seed)
    return factor @ factor.T / size


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet(mean_a: np.ndarray, a: np.ndarray, mean_b: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance of two Gaussians by symmetric square roots."""
    cross = root(root(a) @ b @ root(a))
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(a) + np.trace(b) - 2 * np.trace(cross))


def test_fid_is_the_distance_of_gaussians_with_known_moments() -> None:
    mean_a, mean_b = normal(2, 6, 1)
    a, b = spd(6, 2), spd(6, 3)
    found = fid(with_moments(normal(50, 6, 4), mean_a, a), with_moments(normal(70, 6, 5), mean_b, b))
    assert found == pytest.approx(frechet(mean_a, a, mean_b, b), rel=1e-9)


def test_fid_of_diagonal_covariances_has_a_closed_form() -> None:
    first, second = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    shift = np.array([0.0, 3.0, 4.0])
    a = with_moments(normal(40, 3, 0), np.zeros(3), np.diag(first))
    b = with_moments(normal(40, 3, 1), shift, np.diag(second))
    assert fid(a, b) == pytest.approx(25 + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2), rel=1e-9)


def test_fid_with_fewer_pictures_than_features_is_the_same_distance() -> None:
    a, b = normal(20, 48, 1), normal(25, 48, 2) + 0.5
    expected = frechet(a.mean(axis=0), np.cov(a.T), b.mean(axis=0), np.cov(b.T))
    assert fid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-5)


def written_out(a: np.ndarray, b: np.ndarray, gamma: float) -> float:
    """Return the unbiased squared MMD, sum by sum (Gretton et al. 2012, eq. 3)."""
    n, m = len(a), len(b)
    within_a = sum((gamma * a[i] @ a[j] + 1) ** 3 for i in range(n) for j in range(n) if i != j)
    within_b = sum((gamma * b[i] @ b[j] + 1) ** 3 for i in range(m) for j in range(m) if i != j)
    between = sum((gamma * x @ y + 1) ** 3 for x in a for y in b)
    return within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * between / (n * m)


@pytest.mark.parametrize("gamma", [1.0, 1 / 8])
def test_kid_is_the_unbiased_mmd_of_its_subsets(gamma: float) -> None:
    a, b = normal(12, 8, 1), normal(16, 8, 2) + 0.3
    found = kid(torch.from_numpy(a), torch.from_numpy(b), gamma=gamma, subsets=5, seed=3)
    torch.manual_seed(3)  # the order in which subsets are drawn
    drawn = [(a[torch.randperm(12)[:6]], b[torch.randperm(16)[:6]]) for _ in range(5)]
    values = [written_out(first, second, gamma) for first, second in drawn]
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9)
    assert found.std == pytest.approx(np.std(values), rel=1e-9)
    assert (found.subsets, found.size) == (5, 6)


def test_kid_of_equal_distributions_is_zero_within_its_deviation() -> None:
    a, b = (torch.nn.functional.normalize(torch.from_numpy(normal(400, 16, seed)), dim=1) for seed in (1, 2))
    same, other = kid(a, b), kid(a, torch.nn.functional.normalize(b + 0.1, dim=1))
    assert abs(same.mean) < 2 * same.std
    assert other.mean > 5 * other.std


def test_kid_is_a_function_of_its_arguments() -> None:
    a, b = torch.from_numpy(normal(20, 4, 1)), torch.from_numpy(normal(20, 4, 2))
    state = torch.random.get_rng_state()
    assert kid(a, b) == kid(a.clone(), b.clone())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_order_of_pictures_and_sides_changes_no_fid() -> None:
    a, b = torch.from_numpy(normal(30, 5, 1)), torch.from_numpy(normal(30, 5, 2) + 1)
    assert fid(a.flip(0), b) == pytest.approx(fid(a, b), rel=1e-10)
    assert fid(b, a) == pytest.approx(fid(a, b), rel=1e-10)
    assert fid(a, a) == pytest.approx(0, abs=1e-9)


def test_too_few_pictures_are_said_in_one_line() -> None:
    assert too_few(FID_NEEDS, 2048) is None
    assert too_few(500, 384) == (
        "500 pictures a side: FID needs 10,000, so FID compares only with figures of the same number of pictures; "
        "KID's subsets are smaller than the usual 1,000"
    )
    assert "and more than its 384 features" in (too_few(300, 384) or "")
    assert "KID" not in (too_few(5000, 384) or "")


def test_sets_that_cannot_be_compared_are_refused() -> None:
    good = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="cannot be compared"):
        fid(good, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least 2 a side"):
        fid(good, good[:1])
    with pytest.raises(ValueError, match="at least 4 a side"):
        kid(good, good[:3])
    with pytest.raises(ValueError, match="not finite"):
        fid(good, good * torch.nan)


def test_without_torchmetrics_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(MeasureUnavailable, match=r"pip install 'sd3tune\[eval\]'"):
        fid(torch.zeros(4, 3), torch.zeros(4, 3))

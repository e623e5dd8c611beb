"""A limit on drift: it is measured as defined, steers the prior's weight, and survives a stop."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sd3tune.errors import ConfigError, Interrupted
from sd3tune.training.drift import LEAST, MOST, RATE, DriftLimit

KEPT = slice(2, 4)


def alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def step_of(limit: DriftLimit, change: float) -> torch.Tensor:
    targets = torch.ones(4, 2, 3, 3)
    limit.measure(targets * (1 + change), targets, KEPT)
    return limit.update(alone)


def test_the_drift_is_that_of_the_kept_samples_of_all_micro_steps_and_processes() -> None:
    torch.manual_seed(0)
    base, prediction = torch.randn(2, 3, 4, 2, 5, 5, dtype=torch.float64)
    ranks = [DriftLimit(0.1, torch.device("cpu")) for _ in range(2)]
    for micro in range(3):
        ranks[micro % 2].measure(prediction[micro].float(), base[micro].float(), KEPT)
    sums = [rank._sums.clone() for rank in ranks]
    drift, factor = ranks[0].update(lambda one: (one + sums[1]) / 2)
    kept_base, kept = base[:, KEPT], prediction[:, KEPT]
    expected = ((kept - kept_base).square().sum() / kept_base.square().sum()).sqrt()
    assert drift.item() == pytest.approx(expected.item(), rel=1e-6)
    assert factor.item() == 1


def test_the_weight_rises_above_the_limit_falls_below_it_and_stays_within_its_bounds() -> None:
    limit = DriftLimit(0.2, torch.device("cpu"))
    assert step_of(limit, 0.3).tolist() == pytest.approx([0.3, 1])
    assert limit.factor.item() == pytest.approx(math.exp(RATE * 0.5))
    step_of(limit, 0.1)
    assert limit.factor.item() == pytest.approx(1)
    step_of(limit, 100)  # counts as twice the limit
    assert limit.factor.item() == pytest.approx(math.exp(RATE))
    for _ in range(200):
        step_of(limit, 0.9)
    assert limit.factor.item() == MOST
    for _ in range(400):
        step_of(limit, 0)
    assert limit.factor.item() == pytest.approx(LEAST)


def test_only_kept_samples_are_weighted_and_no_samples_or_an_overflow_change_nothing() -> None:
    limit = DriftLimit(0.2, torch.device("cpu"))
    limit.factor.fill_(3)
    assert limit.weighted(torch.tensor([1.0, 2.0, 3.0, 4.0]), KEPT).tolist() == [1, 2, 9, 12]
    assert limit.update(alone)[0].isnan()
    step_of(limit, math.inf)
    assert limit.factor.item() == 3


PRIOR = "data.sources=[{{path: {path}, prior: {{kind: prediction, prompt: a toy, drift_limit: {limit}}}}}]"
SETTINGS = ("data.buckets=false", "train.batch_size=2", "optimizer.lr=0.03", "checkpoint.every=5")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_strict_limit_keeps_more_and_a_stopped_run_resumes_to_the_same_bytes(
    quick_config, tiny_images: Path, tmp_path: Path
) -> None:
    import sd3tune

    def config(name: str, limit: float):
        source = PRIOR.format(path=tiny_images, limit=limit)
        return quick_config(tmp_path / name, source, *SETTINGS, "train.steps=30")

    def stop(view) -> None:
        if view.step == 15:
            raise KeyboardInterrupt

    for name, limit in (("strict", 0.1), ("loose", 1)):
        sd3tune.train(config(name, limit))
    strict, loose = lines(tmp_path / "strict"), lines(tmp_path / "loose")
    assert strict[0]["drift"] == pytest.approx(0, abs=1e-5)  # B is 0
    assert strict[0]["prior_weight"] == loose[0]["prior_weight"] == 1
    assert strict[-1]["prior_weight"] > 2
    assert loose[-1]["prior_weight"] < 0.5
    late = [sum(line["drift"] for line in of[-10:]) / 10 for of in (strict, loose)]
    assert 0.1 < late[0] < 0.9 * late[1]
    with pytest.raises(Interrupted):
        sd3tune.train(config("stopped", 0.1), callbacks=[stop])
    sd3tune.train(config("stopped", 0.1), resume=True)
    file = "adapter/pytorch_lora_weights.safetensors"
    assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "strict" / file).read_bytes()
    assert lines(tmp_path / "stopped") == strict


def test_one_limit_holds_for_a_run(quick_config, tiny_images: Path, tmp_path: Path) -> None:
    source = "{{path: {path}, prior: {{kind: prediction, prompt: a toy, drift_limit: {limit}}}}}"
    both = ", ".join(source.format(path=tiny_images, limit=limit) for limit in (0.1, 0.2))
    with pytest.raises(ConfigError, match=r"sources\.1\.prior\.drift_limit and sources\.0\.prior\.drift_limit differ"):
        quick_config(tmp_path / "run", f"data.sources=[{both}]")

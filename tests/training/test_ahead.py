"""Modulations for windows of steps: the same wherever a run was resumed, and those of each step's own batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sd3tune.flow.objective import model_timestep
from sd3tune.model.compute.hoist import compute_ahead, hoist, modulate
from sd3tune.training import ahead
from sd3tune.training.ahead import AheadBatches, modulated, window_length, with_modulations
from sd3tune.training.step import predict_velocity

PRIOR = "data.sources.0.prior={kind: prediction, prompt: a photo}"


@pytest.mark.parametrize("prior", [(), (PRIOR,)], ids=["instances", "with own prediction"])
def test_a_micro_steps_modulation_is_its_own_wherever_one_begins(
    quick_config, assembled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prior: tuple[str, ...]
) -> None:
    monkeypatch.setattr(ahead, "LONGEST", 5)  # not a multiple of the accumulation
    training = assembled(
        quick_config(
            tmp_path, "train.batch_size=2", "train.gradient_accumulation=2", "data.caption_dropout=0.5", *prior
        )
    )
    assert with_modulations(training.batches, training.transformer, training.method) is training.batches
    assert window_length(training.batches) == 1
    hoist(training.transformer)
    begun = AheadBatches(training.batches, training.transformer, training.method)
    assert window_length(begun) == 5
    from_the_start = {(step, micro): begun.fetch(step, micro) for step in range(6) for micro in range(2)}
    resumed = AheadBatches(training.batches, training.transformer, training.method)
    for step, micro in [(3, 1), (4, 0), (4, 1), (5, 0), (5, 1)]:
        batch, again = from_the_start[step, micro], resumed.fetch(step, micro)
        assert torch.equal(batch.sigma, again.sigma)
        assert all(map(torch.equal, batch.modulation, again.modulation))
        pooled = training.method.conditioning(batch.embeddings, training.transformer)[1]
        (own,) = compute_ahead(training.transformer, [(model_timestep(batch.sigma), pooled)])
        for found, expected in zip(batch.modulation, own, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
        kept = batch.rows(batch.kept)
        assert [len(rows) for rows in kept.modulation] == [2 if prior else 0] * len(own)
        if prior:
            with torch.no_grad():
                ahead_of_it = predict_velocity(training.transformer, training.method, kept)
                modulate(training.transformer, None)
                kept_alone = predict_velocity(training.transformer, training.method, batch.rows(batch.kept))
            torch.testing.assert_close(ahead_of_it, kept_alone, rtol=1e-5, atol=1e-5)


def test_a_table_is_bounded(quick_config, assembled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = assembled(quick_config(tmp_path, "train.batch_size=2"))
    hoist(training.transformer)
    monkeypatch.setattr(ahead, "TABLE_BYTES", 200_000)
    batches = AheadBatches(training.batches, training.transformer, training.method)
    batch = batches.fetch(0, 0)
    assert 1 < batches.length < ahead.LONGEST
    assert sum(rows.untyped_storage().nbytes() for rows in batch.modulation) <= 200_000


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_single_batches_get_the_models_own_modulations_a_window_at_a_time(
    quick_config, assembled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    training = assembled(quick_config(tmp_path, "data.caption_dropout=0.5", f"model.dtype={dtype}"))
    transformer, method = training.transformer, training.method
    batches = [training.batches.fetch(step, 0) for step in range(5)]
    assert list(modulated(batches, transformer, method)) == batches, "not hoisted"
    hoist(transformer)
    with torch.no_grad():
        expected = [predict_velocity(transformer, method, batch) for batch in batches]
    monkeypatch.setattr(ahead, "LONGEST", 3)
    computed = []
    monkeypatch.setattr(ahead, "compute_ahead", lambda *given: computed.append(len(given[1])) or compute_ahead(*given))
    with torch.no_grad():
        found = [predict_velocity(transformer, method, batch) for batch in modulated(batches, transformer, method)]
    assert computed == [3, 2]
    assert all(map(torch.equal, found, expected))

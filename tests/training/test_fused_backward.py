"""Updates inside the backward pass: the same training to the bit, without a gradient of the whole model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sd3tune.commands.train import run_training
from sd3tune.errors import ConfigError, RunError, UserError
from sd3tune.run.preflight import make_plan
from sd3tune.training import fused_backward
from sd3tune.training.batches import Batch, Batches
from sd3tune.training.checkpoint import list_checkpoints
from sd3tune.training.loop import View

FUSED = "train.fused_backward=true"
UNCLIPPED = "train.max_grad_norm=null"
FULL = ("method={kind: full}", UNCLIPPED)
POISONED = 3


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny has fewer weights than one group of a real model."""
    monkeypatch.setattr(fused_backward, "LEAST_VALUES", 4096)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("adamw", ("model.dtype=bf16", "train.gradient_checkpointing=selective")),
        ("adamw8bit", ("train.gradient_checkpointing=block",)),
    ],
    ids=["adamw in bf16", "adamw8bit in fp32"],
)
def test_whole_runs_are_equal_to_the_byte_and_resume_either_way(
    quick_config, tmp_path: Path, assert_equal_runs, kind: str, more: tuple[str, ...]
) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings = (
        *FULL,
        f"optimizer.kind={kind}",
        "train.steps=4",
        "checkpoint={every: 2, keep: 9}",
        "ema={decay: 0.5}",
        *more,
    )
    run_training(quick_config(tmp_path / "plain", *settings))

    def stop(view: View) -> None:
        if view.step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_training(quick_config(tmp_path / "fused", *settings, FUSED), callbacks=[stop])
    run_training(quick_config(tmp_path / "fused", *settings, FUSED), resume=True)
    plain, fused = (tmp_path / name / "metrics.jsonl" for name in ("plain", "fused"))
    norms = [[float(of) for of in re.findall(r'"grad_norm": ([^,}]+)', file.read_text())] for file in (plain, fused)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)  # sums over other parts
    fused.write_text(plain.read_text())
    assert_equal_runs(tmp_path / "plain", tmp_path / "fused")


def test_no_gradient_of_the_whole_model_exists(assembled, quick_config, tmp_path: Path) -> None:
    """Nor of a large part of it: when a group is updated, no other gradient is there but its neighbour's."""
    config = quick_config(tmp_path, *FULL, FUSED)
    training = assembled(config)
    training.state.master.gradient = training.state.master.gradient[:0]
    fused = training.state.fused
    assert fused is not None
    held: list[int] = []
    update = fused.optimizer.update_slice

    def watched(start: int, gradient: torch.Tensor) -> None:
        others = [group.gradient for group in fused._groups if group.gradient is not None]
        whole = [of.grad for of in training.state.master.parameters if of.grad is not None]
        held.append(gradient.numel() + sum(of.numel() for of in others) + sum(of.numel() for of in whole))
        update(start, gradient)

    fused.optimizer.update_slice = watched
    training.step()
    values = training.state.master.master.numel()
    assert len(held) > 20
    assert max(held) <= 3 * fused.most_values < values / 4


@pytest.fixture
def poisoned() -> Iterator[pytest.MonkeyPatch]:
    """Makes the latents of step `POISONED` NaN, until it is undone."""
    fetch = Batches.fetch

    def fetched(batches: Batches, step: int, micro: int) -> Batch:
        batch = fetch(batches, step, micro)
        return replace(batch, latents=batch.latents * torch.nan) if step == POISONED - 1 else batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "fetch", fetched)
        yield patch


def test_a_gradient_that_is_not_finite_ends_the_run_at_the_last_good_checkpoint(
    quick_config, tmp_path: Path, poisoned: pytest.MonkeyPatch, assert_equal_runs
) -> None:
    settings = (*FULL, FUSED, "train.steps=5", "train.log_every=5", "checkpoint={every: 2, keep: 9}")
    run = tmp_path / "run"
    message = r"stopped at step 3: the gradient is not finite, for .*; --resume goes on from step-000002"
    with pytest.raises(RunError, match=message):
        run_training(quick_config(run, *settings))
    assert [path.name for path in list_checkpoints(run)] == ["step-000002"]
    poisoned.undo()
    run_training(quick_config(run, *settings), resume=True)
    run_training(quick_config(tmp_path / "good", *settings))
    assert_equal_runs(tmp_path / "good", run)


def test_it_ends_as_soon_as_that_is_read(quick_config, tmp_path: Path, poisoned: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    with pytest.raises(RunError, match=r"step 3: .*; there is no checkpoint yet: start again"):
        run_training(
            quick_config(tmp_path / "run", *FULL, FUSED, "train.steps=9"),
            callbacks=[lambda view: seen.append(view.step)],
        )
    assert max(seen) <= POISONED + 1
    assert not list_checkpoints(tmp_path / "run")


def test_what_needs_the_whole_gradient_is_one_line(quick_config, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="fused_backward is true, but max_grad_norm is 1 and gradient_accumulation is 1;"
    ):
        quick_config(tmp_path, FUSED)
    with pytest.raises(
        ConfigError, match="max_grad_norm is null and gradient_accumulation is 2; set max_grad_norm: null"
    ):
        quick_config(tmp_path, FUSED, UNCLIPPED, "train.gradient_accumulation=2")
    with pytest.raises(ConfigError, match=r"optimizer\.kind is prodigy, which needs the whole gradient; set "):
        quick_config(tmp_path, FUSED, UNCLIPPED, "optimizer={kind: prodigy}")
    config = quick_config(tmp_path, FUSED, UNCLIPPED, "model.dtype=fp16")
    with pytest.raises(UserError, match=r"train\.fused_backward: fp16 overflows in some steps"):
        make_plan(config, torch.device("cpu"), resume=None)

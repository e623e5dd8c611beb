"""Swapped blocks: the same results to the bit, in less memory, with each block copied as rarely as can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sd3tune.commands.train import run_training
from sd3tune.config import Config
from sd3tune.errors import ConfigError, UserError
from sd3tune.forecast.forecast import forecast, forecast_inputs
from sd3tune.forecast.footprint import bytes_of, tensors_of
from sd3tune.model.compute import swap
from sd3tune.model.compute.swap import swapped_blocks, swapped_weights
from sd3tune.model.load.quantized import statistics
from sd3tune.run.preflight import make_plan
from sd3tune.run.setup import load_base, make_trainable
from sd3tune.training.flat_master import FlatMaster
from sd3tune.training.loop import View

ALL = "train.swap_blocks=4"
EVERYTHING = (
    "train.steps=4", "checkpoint={every: 2, keep: 9}", "ema={decay: 0.5}", "validation={holdout: 1, every: 2}",
    "preview={every: 2, prompts: [a photo of sks dog], steps: 2, seed: 11}",
    "data.sources.0.prior={kind: prediction, prompt: a dog, weight: 0.5}",
)  # fmt: skip


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks whose weights are copied to the device, in order: their numbers among the swapped ones."""
    seen: list[int] = []
    fill = swap._Buffer.fill

    def counted(buffer, index: int, pieces) -> None:
        if buffer._holds != index:
            seen.append(index)
        fill(buffer, index, pieces)

    monkeypatch.setattr(swap._Buffer, "fill", counted)
    return seen


def test_whole_runs_are_equal_to_the_byte_and_resume_with_another_number(
    quick_config, tmp_path: Path, assert_equal_runs
) -> None:
    run_training(quick_config(tmp_path / "plain", *EVERYTHING))

    def stop(view: View) -> None:
        if view.step == 3:
            raise InterruptedError

    swapped = tmp_path / "swapped"
    with pytest.raises(InterruptedError):
        run_training(quick_config(swapped, *EVERYTHING, ALL), callbacks=[stop])
    run_training(quick_config(swapped, *EVERYTHING, "train.swap_blocks=3"), resume=True)
    assert_equal_runs(tmp_path / "plain", swapped)
    for name in ("step-000004-0.png", "base-0.png"):
        assert (tmp_path / "plain" / "samples" / name).read_bytes() == (swapped / "samples" / name).read_bytes()
    assert (tmp_path / "plain" / "validation.jsonl").read_text() == (swapped / "validation.jsonl").read_text()

"""Updates inside the backward pass: the same training to the bit, without a gradient of the whole model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sd3tune.commands.train import run_training
from sd3tune.training import fused_backward
from sd3tune.training.loop import View

FUSED = "train.fused_backward=true"
UNCLIPPED = "train.max_grad_norm=null"
FULL = ("method={kind: full}", UNCLIPPED)


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny has fewer weights than one group of a real model."""
    monkeypatch.setattr(fused_backward, "LEAST_VALUES", 4096)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_whole_runs_are_equal_to_the_byte_and_resume_either_way(
    quick_config, tmp_path: Path, assert_equal_runs, kind: str
) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    settings = (*FULL, f"optimizer.kind={kind}", "train.steps=4", "checkpoint={every: 2, keep: 9}", "ema={decay: 0.5}")
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

"""Training, drawing and resuming on a GPU in many settings: every tensor is on its device, to the last line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd3tune.runtime.launch import _ACCELERATE
from tests.nullgpu.programs.matrix import DRAWINGS, MADE, TRAININGS

PROGRAM = Path(__file__).with_name("programs") / "matrix.py"


SHORT = ["lora", "text", "nf4", "swap", "resume", "infer offloaded in 4 bits"]
WHOLE = [*TRAININGS, "resume", *DRAWINGS]


@pytest.mark.parametrize("names", [SHORT, pytest.param(WHOLE, marks=pytest.mark.long)], ids=["short", "whole"])
def test_everything_runs_to_its_end(null_gpu, tmp_path: Path, names: list[str]) -> None:
    ran = null_gpu(PROGRAM, tmp_path, *names, fresh_memory=True).succeeded()
    assert ran.facts == dict.fromkeys(names, MADE)


@pytest.mark.long
def test_two_gpus_train_together(null_gpu, tmp_path: Path) -> None:
    """Through accelerate's launcher, as `--num-processes 2` does, and torch's process group for NCCL."""
    launcher = ("-c", _ACCELERATE, "--multi_gpu", "--num_processes", "2")
    settings = {"count": 2, "capability": 89, "fresh_memory": True}
    ran = null_gpu(*launcher, PROGRAM, tmp_path, "lora", **settings).succeeded()
    assert ran.facts == {"lora 0": MADE, "lora 1": MADE}

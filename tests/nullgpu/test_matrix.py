"""Training, drawing and resuming on a GPU in many settings: every tensor is on its device, to the last line."""

from __future__ import annotations

from pathlib import Path

from sd3tune.runtime.launch import _ACCELERATE
from tests.nullgpu.programs.matrix import DRAWINGS, MADE, TRAININGS

PROGRAM = Path(__file__).with_name("programs") / "matrix.py"


def test_everything_runs_to_its_end(null_gpu, tmp_path: Path) -> None:
    names = [*TRAININGS, "resume", *DRAWINGS]
    # Every tensor then has memory of its own, which is zero: no number is left over from another tensor.
    ran = null_gpu(PROGRAM, tmp_path, *names, PYTORCH_NO_CUDA_MEMORY_CACHING="1").succeeded()
    assert ran.facts == dict.fromkeys(names, MADE)


def test_two_gpus_train_together(null_gpu, tmp_path: Path) -> None:
    """Through accelerate's launcher, as `--num-processes 2` does, and torch's process group for NCCL."""
    launcher = ("-c", _ACCELERATE, "--multi_gpu", "--num_processes", "2")
    ran = null_gpu(
        *launcher, PROGRAM, tmp_path, "lora", count=2, capability=89, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    ).succeeded()
    assert ran.facts == {"lora 0": MADE, "lora 1": MADE}

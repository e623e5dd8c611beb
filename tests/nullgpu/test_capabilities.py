"""GPUs of other generations than the matrix's: each trains in the precision that it has, and no step waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nullgpu.programs.capability import RUNS

PROGRAM = Path(__file__).with_name("programs") / "capability.py"


@pytest.mark.long
def test_a_t4_trains_in_fp16_with_a_loss_scale_on_the_device(null_gpu, tmp_path: Path) -> None:
    ran = null_gpu(PROGRAM, tmp_path, *RUNS, gb=15.8, capability=75, PYTORCH_NO_CUDA_MEMORY_CACHING="1").succeeded()
    assert ran.facts.keys() == set(RUNS)
    for found in ran.facts.values():
        assert (found["dtype"], found["scales on"]) == ("torch.float16", "cuda")
        assert (found["waits"], found["pageable"]) == ({}, 0)
        assert not [kernel for kernel in found["kernels"] if "bfloat16" in kernel.lower()]
    attention = [kernel for kernel in ran.facts["preset"]["kernels"] if "fmha" in kernel]
    assert len(attention) == 2  # forward and backward
    assert all("_f16_" in kernel and "sm75" in kernel for kernel in attention)  # a T4 has no other fused kind

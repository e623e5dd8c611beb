"""Steps that never wait: in the real loop, after the first steps, the host only submits work.

A real GPU then computes without a gap, as the host runs ahead of it.
"""

from __future__ import annotations

from pathlib import Path

from tests.nullgpu.programs.steady import TRAININGS

PROGRAM = Path(__file__).with_name("programs") / "steady.py"


def test_no_step_waits_for_the_gpu_or_copies_pageable_memory(null_gpu, tmp_path: Path) -> None:
    ran = null_gpu(PROGRAM, tmp_path, *TRAININGS, fresh_memory=True).succeeded()
    assert ran.facts == dict.fromkeys(TRAININGS, "")

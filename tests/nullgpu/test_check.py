"""`make check-gpu` on the stand-in: to its last line, and it finds a step in which the host waits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu.checks import CHECKS

PROGRAM = Path(__file__).with_name("programs") / "check.py"


@pytest.mark.long
@pytest.mark.parametrize("compiled", [["uncompiled"], []])
def test_every_check_comes_to_its_end_and_a_step_that_waits_is_found(
    null_gpu, tmp_path: Path, compiled: list[str]
) -> None:
    # Without the allocator's cache all memory is zero, so that all paths compute the same.
    ran = null_gpu(PROGRAM, *compiled, "--shapes", "tiny", "--out", tmp_path, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    found = json.loads((tmp_path / "check.json").read_text())["findings"]
    failed = [one for one in found if not one["passed"]]
    # Without its cache the allocator counts nothing; in a full size it is compared by the tests of presets.
    assert {one["what"] for one in failed} <= {"allocated against plan"}, failed
    assert {one["check"] for one in found} == set(CHECKS)
    assert not any(one["note"].startswith("failed") for one in found)
    assert ran.out.rstrip().endswith(str(tmp_path / "check.json"))
    assert ran.facts["waiting"] == 1
    assert "FAILED steady steps: all: - (failed: RuntimeError: called a synchronizing CUDA operation" in ran.out

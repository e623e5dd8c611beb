"""`make bench-gpu` on the stand-in, so that no hour of a real GPU is lost to a fault in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu.cells import SIDES

PROGRAM = Path(__file__).with_name("programs") / "bench.py"


@pytest.mark.long
def test_the_first_cells_are_measured_to_the_last_line(null_gpu, tmp_path: Path) -> None:
    arguments = ("--shapes", "tiny", "--cells", "2", "--minutes", "5", "--out", tmp_path)
    ran = null_gpu(PROGRAM, *arguments).succeeded()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["environment"]["device"] == "Null GPU"
    assert found["ceilings"].keys() == {"gemm_tflops", "copy_gbs", "attention_tflops", "attention_ms"}
    assert [[row[side]["outcome"] for side in SIDES] for row in found["cells"]] == 2 * [["measured"] * 2]
    assert found["not_measured"] == []
    assert ran.out.rstrip().endswith(str(tmp_path / "gpu.json"))

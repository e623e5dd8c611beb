"""The harness at its smallest: what it writes, how it takes turns, and that it refuses to compare unequal work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks import compare, digests, encoding, report
from benchmarks.bare import Ready
from benchmarks.cells import CELLS
from benchmarks.compare import GateError, Turns, run_cell, summarise
from benchmarks.run import main
from sd3tune.training.loop import View

README = "before\n<!-- results -->\nan old table\n<!-- end of results -->\nafter\n"


def test_a_run_writes_its_figures_and_renews_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(README)
    assert main(["--cells", "tiny-fp32", "--rounds", "2", "--steps", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results" / "trainer.json").read_text())
    assert {"commit", "versions", "cpu", "cores", "threads"} <= set(results["environment"])
    (row,) = results["cells"]
    assert (row["cell"], row["rounds"], row["steps_per_round"], row["target"]) == ("tiny-fp32", 2, 1, None)
    assert max(row["gate"].values()) < 1e-4
    for name in ("ratio", "cpu_ratio", "overhead_ms_per_step"):
        assert row[name]["low"] <= row[name]["median"] <= row[name]["high"]
    assert [len(row["seconds"][side]) for side in ("trainer", "bare")] == [2, 2]
    assert 0.5 < row["peak_bytes"]["bare"] / row["peak_bytes"]["trainer"] < 2
    assert min(row["peak_bytes"].values()) > 4 * 500_000  # the model's parameters alone
    table = capsys.readouterr().out
    assert "| tiny-fp32 |" in table
    readme = (tmp_path / "README.md").read_text()
    assert readme == README.replace("an old table\n", table)


def test_unequal_work_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = compare.ready

    def other(*draws: Any) -> Ready:
        inputs = same(*draws)
        return replace(inputs, timestep=inputs.timestep + 10)

    monkeypatch.setattr(compare, "ready", other)
    with pytest.raises(GateError, match="differ"):
        run_cell(CELLS["tiny-fp32"], tmp_path, rounds=2, steps=1)


def test_the_sides_swap_places_and_only_whole_rounds_count() -> None:
    order: list[str] = []
    turns = Turns(5, rounds=4, steps=2, bare_step=lambda: order.append("B"), device=torch.device("cpu"))
    for step in range(5, turns.last_step + 2):  # the loop calls back before its first step and after each
        if step > 5:
            order.append("T")
        turns(cast(View, _At(step)))
    assert "".join(order) == "TTBB" + "TTBBBBTT" * 2 + "T"
    assert len(turns.trainer) == len(turns.bare) == 4


def test_the_ratio_is_speed_over_speed_round_by_round() -> None:
    trainer, bare = [(2.0, 4.0), (1.0, 2.0), (4.0, 8.0)], [(1.0, 4.0), (1.0, 2.0), (1.0, 8.0)]
    figures = summarise(trainer, bare, steps=2)
    assert figures["ratio"] == {"median": 0.5, "low": 0.375, "high": 0.75}
    assert figures["cpu_ratio"]["median"] == 1
    assert figures["overhead_ms_per_step"]["median"] == 500
    assert figures["trainer_images_per_s"] == 2 * 2 / 2.0


def test_encoding_is_compared_with_what_the_bare_encoders_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with a tolerance that fp32 cannot keep: the first round makes the same to rounding, and then stops."""
    monkeypatch.setattr(encoding, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="differs by") as refused:
        encoding.run_encoding(tmp_path, images=1, side=64)
    assert 0 < float(str(refused.value).split()[4]) < 1e-4


def test_the_lines_below_the_table() -> None:
    side = {"first_step_s": 5.0, "without_imports_s": 0.5, "peak_bytes": 9e8}
    found = {"images": 2, "pixels": 64, "bare_per_s": 2.0, "sd3tune_per_s": 1.0, "target": 0.95}
    ratio = {"median": 0.5, "low": 0.4, "high": 0.6}
    results = {"environment": report.environment(), "cells": [], "encoding": {**found, "ratio": ratio}}
    text = report.table({**results, "starts": {"cold": side, "warm": {**side, "first_step_s": 4.0}}})
    assert "1 by sd3tune, ratio 0.500 (0.400 to 0.600); target 0.95 missed." in text
    assert "4.0 s, 0.50 s of it not imports, 900 MB with all of it." in text


def test_digests_are_timed_in_every_other_pass(tmp_path: Path) -> None:
    """A pass reads 7 tensors of each of 16 examples, perhaps 2 of them a turn ahead, and a checkpoint saves 4."""
    row = digests.measure("tiny-fp32", tmp_path, rounds=2)
    assert 14 * 7 + 4 <= row["calls_per_turn"] <= 16 * 7 + 4
    assert row["share"] > 0
    assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]


class _At:
    """As much of a View as a turn looks at."""

    def __init__(self, step: int) -> None:
        self.step = step

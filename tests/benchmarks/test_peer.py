"""The harness beside diffusers' example: equal work for both sides, honest ratios, and a gate that can fail."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peer import gate, measure, report, run
from benchmarks.peer.cells import CELLS, METRICS, PeerCell
from benchmarks.peer.commands import our_arguments, peer_arguments
from benchmarks.peer.materials import Materials, draw_photos
from benchmarks.peer.measure import Figures, Measured, RunFailed, figures, ratios, rows, run_side, take_turns
from sd3tune.config import load_config

CELL = CELLS["tiny-fp32-one"]
PASSED = {"loss_relative_error": 0.0, "gradient_cosine": 1.0, "passed": True}
STAND_IN = """
import sys, torch
from torch.nn import Parameter
weight = Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=0.1)
for step in range(int(sys.argv[1])):
    weight.grad = torch.ones(2)
    optimizer.step()
"""


@pytest.fixture
def materials(tmp_path: Path) -> Materials:
    return Materials(tmp_path / "photos", tmp_path / "captioned", {"tiny": tmp_path / "tiny", "small": tmp_path / "s"})


def run_of(images_per_s: float, seconds: float) -> Figures:
    values = {"images_per_s": images_per_s, "peak_memory": 10 * seconds, "first_step": seconds, "wall": 2 * seconds}
    return Figures(values, {"images_per_s": images_per_s, "first_step": seconds, "wall": seconds})


def measured() -> Measured:
    ours, peer = [run_of(4, 1), run_of(2, 1), run_of(6, 1)], [run_of(2, 3), run_of(2, 2), run_of(2, 5)]
    return Measured(ours, peer, warm=run_of(8, 0.5))


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_both_sides_are_asked_for_the_same(cell: PeerCell, materials: Materials, tmp_path: Path) -> None:
    _, file = our_arguments(cell, materials, tmp_path / "store", tmp_path / "run")
    ours = load_config(Path(file)).config
    flags = peer_arguments(cell, materials, tmp_path / "cache", tmp_path / "peer")
    theirs = dict(itertools.pairwise(flags))
    assert Path(theirs["--pretrained_model_name_or_path"]) == Path(ours.model.base)
    assert int(theirs["--resolution"]) == ours.data.resolution == {"tiny": 256, "small": 512}[cell.base]
    assert int(theirs["--train_batch_size"]) == ours.train.batch_size == 2
    assert int(theirs["--max_train_steps"]) == ours.train.steps
    assert int(theirs["--rank"]) == ours.method.rank == ours.method.alpha == 4
    assert float(theirs["--learning_rate"]) == ours.optimizer.lr
    assert int(theirs["--max_sequence_length"]) == ours.model.max_sequence_length
    assert theirs["--mixed_precision"] == {"fp32": "no", "bf16": "bf16"}[ours.model.dtype]
    assert ("--cache_latents" in flags) == (cell.captions == "one-cached")
    assert ("--dataset_name" in flags) == (ours.data.sources[0].caption is None) == (cell.captions == "per-image")
    assert not ours.preview.prompts
    assert "--validation_prompt" not in flags


def test_the_cells_are_all_that_were_promised() -> None:
    assert len(CELLS) == 2 * 3 * 2
    assert {cell.name for cell in CELLS.values() if cell.least_speedup == 1.5} == {
        f"tiny-{dtype}-{captions}" for dtype in ("fp32", "bf16") for captions in ("one", "per-image")
    }


def test_photos_are_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one", "other"):
        draw_photos(tmp_path / name)
    one, other = ([photo.read_bytes() for photo in sorted((tmp_path / name).iterdir())] for name in ("one", "other"))
    assert one == other
    assert len(set(one)) == 6


def test_figures_count_from_the_start_of_the_process_and_pass_over_the_first_steps() -> None:
    steps = [[103.0, 2.0], [109.0, 5.0], [110.0, 6.0], [112.0, 7.0], [113.0, 8.0]]
    found = figures({"steps": steps, "cpu": 9.0, "peak_bytes": 3_000_000}, 100.0, 15.0, steps=5, warmup=2)
    assert found.values == {"images_per_s": 2.0, "peak_memory": 3.0, "first_step": 3.0, "wall": 15.0}
    assert found.cpu == {"images_per_s": 2.0, "first_step": 2.0, "wall": 9.0}
    with pytest.raises(RunFailed, match="5 optimizer steps instead of 6"):
        figures({"steps": steps, "cpu": 9.0, "peak_bytes": 1}, 100.0, 15.0, steps=6, warmup=2)


def test_a_ratio_above_one_means_that_sd3tune_is_better() -> None:
    assert ratios(measured(), "images_per_s") == [2, 1, 3]
    assert (
        ratios(measured(), "first_step") == ratios(measured(), "wall") == ratios(measured(), "peak_memory") == [3, 2, 5]
    )


def test_a_row_per_metric_with_the_median_of_the_pairs() -> None:
    found = rows(CELL, measured())
    assert [row["cell"] for row in found] == [f"{CELL.name} {metric}" for metric in METRICS]
    speed, memory, first, _ = found
    assert (speed["ours"], speed["peer"], speed["ratio"], speed["cpu_ratio"], speed["target"]) == (4, 2, 2, 2, 1.5)
    assert (first["ours"], first["peer"], first["ratio"], first["ours_warm"]) == (1, 3, 3, 0.5)
    assert memory["cpu_ratio"] is None
    assert speed["pairs"][1] == {"ours": 2, "peer": 2}


def test_sides_take_turns() -> None:
    order: list[str] = []
    for number in range(3):
        take_turns([lambda: order.append("ours"), lambda: order.append("peer")], number)
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_files_hold_the_rows_and_the_table_tells_what_is_behind(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("before\n<!-- peer -->\nold\n<!-- end of peer -->\nafter\n")
    behind = Measured([run_of(2, 3)], [run_of(2, 1)])
    cells = [*rows(CELL, measured()), *rows(CELLS["small-bf16-one"], behind)]
    results: dict[str, Any] = {"environment": report.environment(), "gate": PASSED, "cells": cells}
    report.write(results, tmp_path)
    written = json.loads((tmp_path / "results" / "peer.json").read_text())
    assert all({"cell", "ours", "peer", "ratio"} <= set(row) for row in written["cells"])
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- peer -->\n")
    assert readme.endswith("\n<!-- end of peer -->\nafter\n")
    assert "| tiny, 256 px | fp32 | one caption | 4, 2 | 2.00 | 3.00 | 3.00 | 3.00 | 1.5x images/s met |" in readme
    assert "| 1.00 | 0.33 | 0.33 | 0.33 | 1x images/s missed: peak memory, first step, wall time |" in readme


def test_steps_of_any_optimizer_are_stamped_and_failures_show_their_output(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(STAND_IN)
    found = run_side(CELL, "peer", [str(script), str(CELL.size.steps)], tmp_path)
    assert 0 < found.values["first_step"] < found.values["wall"]
    assert found.values["peak_memory"] > 10
    with pytest.raises(RunFailed, match=r"peer ended with exit code 1(.|\n)*ValueError: invalid literal"):
        run_side(CELL, "peer", [str(script), "many"], tmp_path)


@pytest.mark.parametrize(("text", "says"), [(None, "no such file"), ("import torch\n", "not that script")])
def test_a_wrong_path_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, says: str
) -> None:
    script = tmp_path / "script.py"
    if text is not None:
        script.write_text(text)
    assert run.main([str(script)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {script}: {says}")
    assert "PEER_SCRIPT" in line


def test_the_gate_fails_for_another_loss_gradient_or_coverage() -> None:
    gradients = {"a.lora_A": torch.tensor([1.0, 2.0]), "a.lora_B": torch.tensor([3.0, 4.0])}

    def seen(**more: torch.Tensor) -> gate.Seen:
        return gate.Seen(loss=torch.tensor(2.0), gradients={**gradients, **more})

    assert gate.compare(seen(), 2.0 * (1 + 9e-6), gradients)["passed"]
    assert gate.compare(seen(**{"b.lora_B": torch.zeros(2)}), 2.0, gradients)["passed"]
    assert not gate.compare(seen(), 2.0 * (1 + 2e-5), gradients)["passed"]
    assert not gate.compare(seen(), 2.0, {**gradients, "a.lora_B": torch.tensor([4.0, 3.0])})["passed"]
    assert not gate.compare(seen(**{"b.lora_B": torch.ones(2)}), 2.0, gradients)["passed"]


@pytest.mark.skipif("PEER_SCRIPT" not in os.environ, reason="PEER_SCRIPT does not name diffusers' example script")
def test_a_real_pair_of_runs_after_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PAIRS", 1)
    monkeypatch.setattr(measure, "MAX_PAIRS", 1)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (tmp_path / "README.md").write_text("<!-- peer -->\n<!-- end of peer -->\n")
    cells = ["tiny-bf16-one-cached", "tiny-fp32-per-image"]
    assert run.main([os.environ["PEER_SCRIPT"], "--cells", *cells, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results" / "peer.json").read_text())
    assert results["gate"]["passed"]
    assert [row["cell"] for row in results["cells"]] == [f"{cell} {metric}" for cell in cells for metric in METRICS]
    assert all(row["ratio"] > 0 for row in results["cells"])

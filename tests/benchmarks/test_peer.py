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
from benchmarks.peer.materials import BASES, Materials, draw_photos
from benchmarks.peer.measure import Measured, Pair, pairs_of_runs, pairs_of_steps, rows, take_turns
from benchmarks.peer.processes import RunFailed, Stamps, run_alone, run_in_turns
from sd3tune.config import load_config

CELL = CELLS["tiny-fp32-one"]
PASSED = {"loss_relative_error": 0.0, "gradient_cosine": 1.0, "passed": True}
STAND_IN = """
import os, sys, torch
from torch.nn import Parameter
name, log, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
weight = Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=0.1)
for step in range(steps):
    with open(log, "a") as file:
        file.write(name + str(step) + " ")
    weight.grad = torch.ones(2)
    optimizer.step()
"""


@pytest.fixture
def materials(tmp_path: Path) -> Materials:
    return Materials(tmp_path / "photos", tmp_path / "captioned", {name: tmp_path / name for name in BASES})


def measured(first_step: Pair) -> Measured:
    pairs = {
        "images_per_s": [Pair(4, 2, 8, 2), Pair(2, 2, 3, 2), Pair(6, 2, 2, 2)],
        "peak_memory": [Pair(10, 30)],
        "first_step": [first_step],
        "warm_start": [Pair(0.5, 2, 0.5, 2)],
        "wall": [Pair(2, 6, 1, 2), Pair(2, 2, 1, 2)],
    }
    return Measured(pairs, warm={"first_step": 0.5})


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_both_sides_are_asked_for_the_same(cell: PeerCell, materials: Materials, tmp_path: Path) -> None:
    _, file = our_arguments(cell, materials, tmp_path / "store", tmp_path / "run")
    ours = load_config(Path(file)).config
    flags = peer_arguments(cell, materials, tmp_path / "cache", tmp_path / "peer")
    theirs = dict(itertools.pairwise(flags))
    assert Path(theirs["--pretrained_model_name_or_path"]) == Path(ours.model.base)
    assert int(theirs["--resolution"]) == ours.data.resolution == (256 if cell.base == "tiny" else 512)
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
    assert len(CELLS) == 2 * 3 * 2 + 2
    assert {cell.name for cell in CELLS.values() if cell.least_speedup == 1.5} == {
        f"tiny-{dtype}-{captions}" for dtype in ("fp32", "bf16") for captions in ("one", "per-image")
    }


def test_photos_are_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one", "other"):
        draw_photos(tmp_path / name)
    one, other = ([photo.read_bytes() for photo in sorted((tmp_path / name).iterdir())] for name in ("one", "other"))
    assert one == other
    assert len(set(one)) == 6


def stamps(began: float) -> Stamps:
    """Five steps; after the third the process waits for ten seconds, in one of which it works."""
    ended = [(3.0, 2.0), (9.0, 5.0), (10.0, 6.0), (22.0, 8.0), (23.0, 9.0)]
    went_on = [(3.0, 2.0), (9.0, 5.0), (20.0, 7.0), (22.0, 8.0), (23.0, 9.0)]
    moved = [([began + t, cpu], [began + u, other]) for (t, cpu), (u, other) in zip(ended, went_on, strict=True)]
    return Stamps(began, began + 30.0, 12.0, moved, 3_000_000, [1.0, 0.5])


def test_waiting_is_no_part_of_a_step_nor_are_the_first_steps() -> None:
    assert stamps(100.0).durations(warmup=2, clock=0) == [1.0, 2.0, 1.0]
    assert stamps(100.0).durations(warmup=2, clock=1) == [1.0, 1.0, 1.0]
    assert pairs_of_steps(stamps(0.0), stamps(5.0), warmup=2)[1] == Pair(1.0, 1.0, 2.0, 2.0)


def test_runs_are_measured_from_the_start_of_the_process_to_its_end() -> None:
    found = pairs_of_runs([stamps(100.0)], [stamps(200.0)], [stamps(300.0)])
    assert found == {
        "peak_memory": [Pair(3.0, 3.0)],
        "first_step": [Pair(3.0, 3.0, 2.0, 2.0)],
        "warm_start": [Pair(2.0, 2.0, 1.5, 1.5)],
        "wall": [Pair(30.0, 30.0, 12.0, 12.0)],
    }


def test_a_row_per_metric_and_a_ratio_above_one_means_that_sd3tune_is_better() -> None:
    found = rows(CELL, measured(Pair(1, 3, 1, 2)))
    assert [row["cell"] for row in found] == [f"{CELL.name} {metric}" for metric in METRICS]
    speed, memory, first, warm, wall = found
    assert (speed["ours"], speed["peer"], speed["ratio"], speed["cpu_ratio"], speed["target"]) == (4, 2, 2, 1.5, 1.5)
    assert (memory["ratio"], memory["cpu_ratio"], memory["target"]) == (3, None, 1)
    assert (first["ours"], first["peer"], first["ratio"], first["cpu_ratio"], first["ours_warm"]) == (1, 3, 3, 2, 0.5)
    assert (warm["ratio"], warm["target"]) == (4, 1 / 0.3)
    assert (wall["ratio"], wall["ratios"]) == (2, [3, 1])


def test_sides_take_turns() -> None:
    order: list[str] = []
    for number in range(3):
        take_turns([lambda: order.append("ours"), lambda: order.append("peer")], number)
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_files_hold_the_rows_and_the_table_tells_what_is_behind(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("before\n<!-- peer -->\nold\n<!-- end of peer -->\nafter\n")
    behind = rows(CELLS["small-bf16-one"], measured(Pair(3, 1, 3, 1)))
    cells = [*rows(CELL, measured(Pair(1, 3, 1, 3))), *behind]
    results: dict[str, Any] = {"environment": report.environment(), "gate": PASSED, "cells": cells}
    report.write(results, tmp_path)
    written = json.loads((tmp_path / "results" / "peer.json").read_text())
    assert all({"cell", "ours", "peer", "ratio"} <= set(row) for row in written["cells"])
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- peer -->\n")
    assert readme.endswith("\n<!-- end of peer -->\nafter\n")
    assert (
        "| tiny, 256 px | fp32 | one caption | 4, 2 | 2.00 | 3.00 | 3.00 | 4.00 | 2.00 | 1.5x images/s met |" in readme
    )
    assert "| 2.00 | 3.00 | 0.33 | 4.00 | 2.00 | 1x images/s missed: first step |" in readme


def test_a_cell_that_is_measured_anew_takes_its_rows_place_and_the_others_keep_theirs(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- peer -->\n<!-- end of peer -->\n")
    here = {**report.environment(), "commit": "a" * 40, "uncommitted_changes": False}

    def write(where: dict[str, Any], cell: str, pair: Pair) -> list[tuple[str, float, str | None]]:
        cells = rows(CELLS[cell], measured(pair))
        report.write({"environment": where, "gate": PASSED, "cells": cells}, tmp_path)
        written = json.loads((tmp_path / "results" / "peer.json").read_text())["cells"]
        return [(row["cell"], row["ratio"], row.get("commit")) for row in written if row["cell"].endswith("first_step")]

    write(here, "tiny-fp32-one", Pair(1, 3, 1, 3))
    later = {**here, "commit": "b" * 40}
    both = write(later, "small-fp32-one", Pair(1, 2, 1, 2))
    assert both == [("small-fp32-one first_step", 2, None), ("tiny-fp32-one first_step", 3, "a" * 10)]
    assert "Of commit aaaaaaaaaa: tiny-fp32-one.\n\n|" in (tmp_path / "README.md").read_text()
    both = write({**here, "commit": "c" * 40}, "tiny-fp32-one", Pair(1, 4, 1, 4))
    assert both == [("tiny-fp32-one first_step", 4, None), ("small-fp32-one first_step", 2, "b" * 10)]
    alone = write({**here, "cores": 64}, "small-fp32-one", Pair(1, 5, 1, 5))
    assert alone == [("small-fp32-one first_step", 5, None)]


@pytest.mark.long
def test_steps_of_any_optimizer_are_stamped(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(STAND_IN)
    found = run_alone("peer", [str(script), "a", str(tmp_path / "log"), "3"], tmp_path, steps=3)
    assert found.started < found.steps[0][0][0] < found.steps[2][0][0] < found.ended
    assert found.peak_bytes > 10**7
    assert 0.1 < found.imports[0] < found.first_step[0]  # torch's is among them
    assert found.cpu > found.steps[2][0][1] > 0


@pytest.mark.long
def test_a_run_that_fails_or_makes_other_steps_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(STAND_IN)
    with pytest.raises(RunFailed, match=r"peer ended with exit code 1(.|\n)*ValueError: invalid literal"):
        run_alone("peer", [str(script), "a", str(tmp_path / "log"), "many"], tmp_path, steps=3)
    with pytest.raises(RunFailed, match="2 optimizer steps instead of 3"):
        run_alone("peer", [str(script), "a", str(tmp_path / "log"), "2"], tmp_path, steps=3)


@pytest.mark.long
def test_processes_step_in_turns(tmp_path: Path) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(STAND_IN)
    sides = {name: [str(script), name, str(log), "6"] for name in ("a", "b")}
    found = run_in_turns(sides, tmp_path, steps=6, turn=2)
    order = log.read_text().split()
    # After its first step either waits, having written down nothing of the second.
    assert sorted(order[:2]) == ["a0", "b0"]
    assert order[2:] == ["a1", "a2", "b1", "b2", "a3", "a4", "b3", "b4", "a5", "b5"]
    assert min(found["b"].durations(1, 0)) > 0


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

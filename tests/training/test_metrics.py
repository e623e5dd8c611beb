"""`metrics.jsonl`: every step once, whole lines, nothing read back from the device while steps are added."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from sd3tune.errors import RunError
from sd3tune.training.metrics import Metrics, read_metrics
from sd3tune.training.step import StepResult

LINE = {"step": 1, "loss": 0.5, "lr": 1e-3, "grad_norm": None, "loss_by_sigma": {"0.0-0.2": None}, "suspects": ["a"]}


def result(losses=(1.0, 3.0), sigmas=(0.1, 0.9), norm=0.5, weight=1.0, device="cpu") -> StepResult:
    losses, sigmas, norm = (torch.tensor(value, device=device) for value in (losses, sigmas, norm))
    return StepResult(losses, weight * losses, sigmas, torch.empty(3, 0, device=device), norm, 1e-3)


def alone(path: Path, last_step: int = 0) -> Metrics:
    return Metrics(path, last_step, lambda tensor: tensor[None], writes=True)


def test_a_line_says_what_the_step_did(tmp_path: Path) -> None:
    metrics = alone(tmp_path / "m.jsonl")
    metrics.add(1, result(losses=(1.0, 3.0, 5.0), sigmas=(0.1, 0.9, 0.99), weight=2.0))
    metrics.flush(wait=True)
    (line,) = read_metrics(metrics.path)
    assert line == {
        "step": 1,
        "loss": 6.0,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "loss_by_sigma": {"0.0-0.2": 1.0, "0.8-1.0": 4.0},
    }
    assert metrics.last == line


def test_sigma_one_belongs_to_the_last_bin(tmp_path: Path) -> None:
    metrics = alone(tmp_path / "m.jsonl")
    metrics.add(1, result(sigmas=(1.0, 0.8)))
    metrics.flush(wait=True)
    assert set(read_metrics(metrics.path)[0]["loss_by_sigma"]) == {"0.8-1.0"}


def test_lines_stay_in_order_over_several_flushes(tmp_path: Path) -> None:
    metrics = alone(tmp_path / "m.jsonl")
    for step in range(1, 8):
        metrics.add(step, result())
        if step % 3 == 0:
            metrics.flush()
    metrics.flush(wait=True)
    metrics.flush(wait=True)
    assert [line["step"] for line in read_metrics(metrics.path)] == list(range(1, 8))


def test_adding_a_step_reads_nothing_from_the_device(tmp_path: Path) -> None:
    metrics = alone(tmp_path / "m.jsonl")
    one = result(device="meta")  # a meta tensor has no value to read
    metrics.add(1, one)
    with pytest.raises(RuntimeError, match="meta"):
        one.losses.tolist()
    metrics.add(2, one)
    assert read_metrics(metrics.path) == []


def test_all_ranks_are_averaged_and_one_writes(tmp_path: Path) -> None:
    def gather(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, tensor + torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0])])

    main, other = (Metrics(tmp_path / name, 0, gather, writes) for name, writes in (("m", True), ("o", False)))
    for metrics in (main, other):
        metrics.add(1, result())
        metrics.flush(wait=True)
    (line,) = read_metrics(main.path)
    assert line["loss"] == 3.0
    assert line["loss_by_sigma"] == {"0.0-0.2": 2.0, "0.8-1.0": 4.0}
    assert not other.path.exists()


def test_a_skipped_step_is_null_and_remembered(tmp_path: Path) -> None:
    metrics = alone(tmp_path / "m.jsonl")
    metrics.add(1, result(norm=float("nan")))
    metrics.add(2, result(losses=(float("inf"), 1.0), norm=float("inf")))
    metrics.add(3, result())
    metrics.flush(wait=True)
    lines = read_metrics(metrics.path)
    assert [line["grad_norm"] for line in lines] == [None, None, 0.5]
    assert lines[1]["loss"] is None
    assert lines[1]["loss_by_sigma"]["0.0-0.2"] is None
    assert list(metrics.skipped) == [1, 2]


def test_lines_after_the_step_resumed_from_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(LINE | {"step": step}) + "\n" for step in range(1, 7)))
    metrics = alone(path, last_step=4)
    metrics.add(5, result())
    metrics.flush(wait=True)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert alone(path, last_step=0).last == {}
    assert path.read_text() == ""


def test_steps_skipped_before_a_resume_are_still_known(tmp_path: Path) -> None:
    first = alone(tmp_path / "m.jsonl")
    for step, norm in enumerate([1.0, float("nan"), 1.0, float("inf")], start=1):
        first.add(step, result(norm=norm))
    first.flush(wait=True)
    assert list(alone(first.path, last_step=3).skipped) == [2]


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3', "\0\0\0"])
def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(LINE | {"step": step}) + "\n" for step in (1, 2)) + tail)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1]", "expected a JSON object, not"),
        (b"\xff", "'utf-8' codec"),
        (b"", "Expecting value"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"step": ' + b"1" * 5000 + b"}", "step: not a whole number"),
        ({"step": "3"}, "step: not a whole number"),
        ({"step": True}, "step: not a whole number"),
        ({"step": -1}, "step: not a whole number"),
        ({"lr": None}, "lr: not a number"),
        ({"loss": "low"}, "loss: not a number"),
        ({"loss": float("nan")}, "loss: not a number"),
        ({"grad_norm": 10**400}, "grad_norm: not a number"),
        ({"loss_by_sigma": {"0.2-0.4": []}}, "loss_by_sigma: not a number"),
        ({"suspects": [{}]}, "suspects: not a number"),
        ({"more": {"of": {"it": 1}}}, "more: not a number"),
    ],
)
def test_an_edited_line_is_named(tmp_path: Path, line, reason: str) -> None:
    path = tmp_path / "m.jsonl"
    edited = line if isinstance(line, bytes) else json.dumps(LINE | line).encode()
    path.write_bytes(b"\n".join([json.dumps(LINE).encode(), edited, json.dumps(LINE).encode()]))
    with pytest.raises(RunError, match=rf"m\.jsonl:2: {reason}.*; delete this line, which only the curves need"):
        read_metrics(path)


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.jsonl")
    with pytest.raises(RunError, match=r"m\.jsonl: is a named pipe, not a file; remove it"):
        read_metrics(tmp_path / "m.jsonl")


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == []

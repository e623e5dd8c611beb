"""`train.memory`: the same training, computed so that it fits."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sd3tune.commands.train import run_training
from sd3tune.errors import ConfigError
from sd3tune.forecast.fitting import fit, fitted_plan, leaner_configurations, memory_budget
from sd3tune.forecast.forecast import CONTEXT, MARGIN, forecast, forecast_inputs
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.processes import ALONE

FP32 = torch.float32


def room_for(peak: int) -> int:
    return round(peak * (1 + MARGIN)) + CONTEXT


@pytest.fixture
def inputs(quick_config, tmp_path: Path):
    values = ("train.batch_size=1", "train.gradient_accumulation=4", "model.t5=false", "model.max_sequence_length=512")
    return forecast_inputs(quick_config(tmp_path, *values), torch.float32)


def test_first_time_is_given_and_then_precision(inputs) -> None:
    tried = [
        (of.config.model.quantize, train.gradient_checkpointing, train.checkpointed_blocks, train.swap_blocks)
        for of in leaner_configurations(inputs)
        for train in [of.config.train]
    ]
    assert tried[:8] == [
        ("none", "none", None, None),
        *(("none", "selective", blocks, None) for blocks in (1, 2, 3, None)),
        ("none", "block", None, None),
        *(("none", "block", None, swapped) for swapped in (3, 4)),
    ]
    if importlib.util.find_spec("bitsandbytes"):
        assert tried[8:] == [("nf4", *rest) for _, *rest in tried[:8]]


@pytest.mark.long
def test_blocks_are_swapped_before_the_base_is_quantised(quick_config, tmp_path: Path) -> None:
    """And fewer of them if that is enough."""
    inputs = forecast_inputs(quick_config(tmp_path, "model.t5=false", "train.gradient_checkpointing=block"), FP32)
    for count in (3, 4):
        leaner = quick_config(
            tmp_path, "model.t5=false", "train.gradient_checkpointing=block", f"train.swap_blocks={count}"
        )
        needed = forecast(forecast_inputs(leaner, FP32)).needed
        found = fit(inputs, needed).inputs.config
        assert (found.train.swap_blocks, found.model.quantize) == (count, "none")
        assert found.train.gradient_checkpointing == "block"


def test_what_has_less_room_costs_more_time_and_fits(inputs) -> None:
    plain = forecast(inputs)
    room = room_for(plain.training.peak) - 1
    found = fit(inputs, room)
    train = found.inputs.config.train
    assert train.gradient_checkpointing == "selective"
    assert train.batch_size * train.gradient_accumulation == 4
    assert found.needed <= room < plain.needed
    assert forecast(found.inputs).needed == found.needed
    assert found.training.flops > plain.training.flops


def test_too_little_is_an_error_with_the_least_that_is_needed(inputs) -> None:
    with pytest.raises(ConfigError, match=r"train.memory: 0.601 GB cannot hold this run: the minimum is 0\.6"):
        fit(inputs, CONTEXT + 1_000_000)


def test_a_run_says_what_was_chosen_and_trains_the_same(
    quick_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = quick_config(tmp_path, "train.memory=5", "train.batch_size=1", "train.gradient_accumulation=2")
    run_training(config)
    assert "memory    0.6" in capsys.readouterr().out
    assert "batch_size: 2" in (tmp_path / "config.yaml").read_text()
    run_training(config, resume=True)
    assert "already finished" in capsys.readouterr().out


def test_auto_is_all_memory_of_a_machine_and_what_is_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_budget(1.5, torch.device("cpu")) == 1_500_000_000
    assert memory_budget("auto", torch.device("cpu")) > 10**9
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 10**9, 8 * 10**9))
    assert memory_budget("auto", gpu) == 5 * 10**9 + CONTEXT  # another program has the rest
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9 - CONTEXT // 2, 8 * 10**9))
    assert memory_budget("auto", gpu) == 8 * 10**9
    assert memory_budget(6, gpu) == 6 * 10**9


def test_processes_fit_the_gpu_with_the_least_memory(quick_config, tmp_path: Path) -> None:
    config = quick_config(tmp_path, "train.memory=auto", "train.batch_size=4", "model.max_sequence_length=512")
    plan = make_plan(config, torch.device("cpu"), False, 1)
    others = replace(ALONE, gather=lambda room: torch.stack([room, torch.tensor(room_for(10_000_000))]))
    alone, shared = (fitted_plan(plan, processes)[0].config.train for processes in (ALONE, others))
    assert (alone.gradient_checkpointing, alone.batch_size) == ("none", 4)
    assert shared.gradient_checkpointing != "none" or shared.batch_size < 4

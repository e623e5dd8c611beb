"""System memory: what stays there is what a real model keeps; `tests/nullgpu/test_released.py` measures loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sd3tune.forecast.footprint import bytes_of, tensors_of
from sd3tune.forecast.forecast import Forecast, forecast, forecast_inputs
from sd3tune.forecast.system import PROCESS, SystemMemory, system_memory
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.compute.hoist import hoist, hoisted
from sd3tune.model.compute.swap import BlockSwap
from sd3tune.model.load.components import load_text_encoder, load_transformer, load_vae
from sd3tune.model.load.quantized import load_transformer_in

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture
def planned(quick_config, tmp_path: Path):
    """`planned("key=value", ...)`: the forecast of a run in bf16."""

    def make(*overrides: str) -> Forecast:
        return forecast(forecast_inputs(quick_config(tmp_path, *overrides), BF16))

    return make


@pytest.mark.parametrize("form", ["none", "int8"])
def test_swapped_blocks_and_hoisted_layers_stay(form: str, planned) -> None:
    found = system_memory(
        planned("preview.prompts=[a dot]", "train.swap_blocks=3", f"model.quantize={form}"), on_the_cpu=False
    )
    base = resolve_base("tiny")
    swap = BlockSwap(base.config("transformer")["num_layers"], 3, CPU)
    transformer = load_transformer_in(form, base, BF16, CPU, hoist, swap.store)
    of_layers = [bytes_of(tensors_of(layer.linear)) for layer in hoisted(transformer)]
    whole = load_transformer(base, BF16)
    grid = whole.pos_embed.pos_embed.nbytes
    kept = sum(of_layers) + grid + sum(stored.nbytes for stored in swap._stored)
    vae = bytes_of(tensors_of(load_vae(base, BF16)))
    assert found.phases["preview"] == kept + vae
    largest = max(stored.nbytes for stored in swap._stored)
    assert found.phases["train"] == bytes_of(tensors_of(whole)) + largest


def test_a_component_passes_through_it_whole(planned) -> None:
    plan = planned("model.t5_quantize=int8")
    t5 = load_text_encoder(resolve_base("tiny"), "t5", BF16, "cpu", 16).model
    found = system_memory(plan, on_the_cpu=False)
    assert found.phases["encode T5"] == bytes_of(tensors_of(t5)) > plan.encoding["t5"].resident


def test_t5_on_the_cpu_also_computes_there(planned) -> None:
    plan = planned("model.t5_device=cpu")
    system = system_memory(plan, on_the_cpu=False)
    assert system.phases["encode T5"] == plan.encoding["t5"].peak
    (row,) = [row for row in system.rows(plan) if row[0] == "encode T5"]
    assert row[1].peak == 0


def test_a_checkpoint_of_a_whole_model_is_copied_to_it(planned) -> None:
    """Master and moments, four bytes each."""
    plan = planned("method={kind: full}", "ema=null")
    assert system_memory(plan, on_the_cpu=False).phases["train"] >= 12 * plan.training.parameters


def test_without_a_gpu_it_holds_all_memory(planned) -> None:
    plan = planned()
    system = system_memory(plan, on_the_cpu=True)
    assert all(system.phases[name] >= use.peak for name, use in plan.phases.items())


def test_a_machine_with_less_is_warned_of() -> None:
    system = SystemMemory({"encode T5": 9_500_000_000, "train": 5_000_000_000})
    assert system.needed == 9_500_000_000 + PROCESS
    assert system.problems(system.needed) == []
    (line,) = system.problems(8_000_000_000)
    assert line.startswith("warning: this machine has 8 GB of system memory, and to encode T5 the run may take 11.5 GB")

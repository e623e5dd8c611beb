"""Every key of a contract is declared: by `Contract`, or by the section of the method that states it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sd3tune.config import dump_config
from sd3tune.config.loader import load_text
from sd3tune.config.meaning import contract_of
from sd3tune.config.shape import all_fields, key_of
from sd3tune.forecast.forecast import forecast_inputs
from sd3tune.model.base import contract as contract_module
from sd3tune.model.base.contract import CONTRACT_KEYS, Contract, declared
from sd3tune.run.contract import make_contract
from sd3tune.run.describe import describe
from sd3tune.run.preflight import make_plan

OPTIONAL = (
    "data.export_tags=true", "model.extra_t5_lengths=[32]", "model.t5_quantize=int8", "model.quantize=int8",
    "flow.noise_offset=0.1", "ema={}", "method.rank_pattern={attn.to_q: 4}", "method.dropout=0.1",
)  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_key_that_a_run_writes_is_declared(quick_config, scratch_config, tmp_path: Path, method: str) -> None:
    config = quick_config(tmp_path / "run", *OPTIONAL) if method == "lora" else scratch_config(tmp_path / "run")
    plan = make_plan(config, torch.device("cpu"), resume=None)
    written = make_contract(plan)
    assert written.keys() - CONTRACT_KEYS.keys() <= contract_of(config.method).keys()
    if method == "lora":
        assert {"tag_frequency", "t5_lengths", "t5_quantize", "quantize", "sampler_noise_offset"} <= written.keys()
        assert {"rank_pattern", "dropout"} == written.keys() - CONTRACT_KEYS.keys()


@pytest.mark.parametrize(
    ("base", "written", "expected"),
    [
        ("nano", (), (16, 2.0)),
        ("nano", ("preview.guidance=4.5",), (16, 4.5)),
        ("nano", ("preview={steps: 28, prompts: [a red ball]}",), (28, 2.0)),
        ("nano", ("model.init=random", "method={kind: full}"), (28, 4.5)),
        ("tiny", (), (28, 4.5)),
    ],
)
def test_previews_take_steps_and_guidance_of_the_base_where_they_are_not_written(
    quick_config, tmp_path: Path, base: str, written: tuple[str, ...], expected: tuple[int, float]
) -> None:
    """In the run, its contract and its forecast; the schema's defaults are for bases that state none."""
    config = quick_config(tmp_path / "run", f"model.base={base}", *written)
    plan = make_plan(config, torch.device("cpu"), resume=None)
    contract, forecast = make_contract(plan), forecast_inputs(config, torch.float32).config
    for preview in (plan.config.preview, forecast.preview):
        assert (preview.steps, preview.guidance) == expected
    assert (contract["sampling_steps"], contract["guidance"]) == expected
    said = [line for line in describe(plan, 1) if line.startswith("sampling")]
    if expected == (16, 2.0):
        assert said == ["sampling  16 steps and guidance 2, as nano states, in previews and `infer`"]
    assert bool(said) == (16 in expected or 2.0 in expected)
    assert load_text(dump_config(plan.config), "config.yaml").config == plan.config


def test_each_configuration_key_in_the_contract_is_declared() -> None:
    """Also those that only some variants have; a method's own keys are its section's."""
    stated = [(name, key.contract) for name, field in all_fields() if (key := key_of(field)) and key.contract]
    names = {name.rpartition(".")[2] if key is True else key for name, key in stated if not name.startswith("method.")}
    assert "sampling_steps" in names
    assert names <= CONTRACT_KEYS.keys()


def test_a_key_that_declares_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(Contract):
        novel: int = 0

    with pytest.raises(KeyError, match="novel: not declared"):
        declared({"base": "tiny", "novel": 1})
    monkeypatch.setattr(contract_module, "Contract", Longer)
    with pytest.raises(TypeError, match="novel: declares no ContractKey"):
        contract_module._declarations()

"""An 8-bit optimizer that does not work here: another one is used, and everything says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import bitsandbytes.functional
import pytest
import torch

from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.config.sections.optimizer import AdamWConfig
from sd3tune.errors import RunError, UserError
from sd3tune.run.contract import start_facts
from sd3tune.run.optimizer_fallback import with_working_optimizer
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.processes import ALONE
from sd3tune.training.loop import View
from sd3tune.training.optimizers import OPTIMIZERS, OptimizerKind

EIGHT_BITS = (
    "optimizer={kind: adamw8bit, lr: 0.01, betas: [0.8, 0.9]}", "train.steps=3", "checkpoint.every=1",
    "ema={decay: 0.5}",
)  # fmt: skip
PLAIN = (EIGHT_BITS[0].replace("adamw8bit", "adamw"), *EIGHT_BITS[1:])
REASON = "RuntimeError: no kernel for this device"


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("no kernel for\nthis device")


def stop(view: View) -> None:
    if view.step == 2:
        raise InterruptedError


def test_what_works_is_used(quick_config, tmp_path: Path, capsys) -> None:
    run_training(quick_config(tmp_path, *EIGHT_BITS))
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["optimizer"] == {"asked": "adamw8bit", "used": "adamw8bit", "reason": None}
    assert "does not work here" not in capsys.readouterr().out


def test_without_the_package_one_line_says_how_to_install_it(quick_config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError) as caught:
        run_training(quick_config(tmp_path / "run", *EIGHT_BITS))
    assert caught.value.problems == (
        "optimizer.kind: adamw8bit needs bitsandbytes: pip install 'sd3tune[bitsandbytes]'",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("broken", ["create_dynamic_map", "quantize_blockwise"])
def test_a_failed_probe_falls_back_to_adamw_with_the_same_settings(
    quick_config, tmp_path: Path, assert_equal_runs, monkeypatch, capsys, broken: str
) -> None:
    run_training(quick_config(tmp_path / "plain", *PLAIN))
    capsys.readouterr()
    monkeypatch.setattr(bitsandbytes.functional, broken, fail)
    run_training(quick_config(tmp_path / "run", *EIGHT_BITS))
    warning = f"warning: optimizer.kind: adamw8bit does not work here ({REASON}); using adamw with the same settings"
    assert warning in capsys.readouterr().out.splitlines()
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["optimizer"] == {"asked": "adamw8bit", "used": "adamw", "reason": REASON}
    assert load_config(tmp_path / "run" / "config.yaml").config.optimizer.kind == "adamw"
    assert_equal_runs(tmp_path / "plain", tmp_path / "run")


def test_run_json_names_any_kind_that_was_asked_for(quick_config, tmp_path: Path) -> None:
    class BrittleConfig(AdamWConfig):
        kind: Literal["brittle"] = "brittle"  # type: ignore[assignment]

    OPTIMIZERS.register(BrittleConfig, OptimizerKind(fail, fallback=AdamWConfig))
    try:
        config = quick_config(tmp_path / "run", "optimizer={kind: brittle, lr: 0.01}")
        plan = make_plan(config, torch.device("cpu"), resume=False)
        described = start_facts(with_working_optimizer(plan, ALONE, lambda line: None), 1)
    finally:
        OPTIMIZERS.unregister("brittle")
    assert described["optimizer"] == {"asked": "brittle", "used": "adamw", "reason": REASON}


def test_numbers_that_are_wrong_are_a_failed_probe_too(quick_config, tmp_path: Path, monkeypatch, capsys) -> None:
    genuine = bitsandbytes.functional.dequantize_blockwise
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_blockwise", lambda *a, **k: 0.5 * genuine(*a, **k))
    run_training(quick_config(tmp_path / "run", *EIGHT_BITS), dry_run=True)
    assert "adamw8bit does not work here (its steps differ from AdamW's)" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_the_optimizer_that_it_used(
    quick_config, tmp_path: Path, assert_equal_runs, monkeypatch
) -> None:
    run_training(quick_config(tmp_path / "plain", *PLAIN))
    config = quick_config(tmp_path / "run", *EIGHT_BITS)
    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes.functional, "quantize_blockwise", fail)
        with pytest.raises(InterruptedError):
            run_training(config, callbacks=[stop])
    with pytest.raises(RunError, match=r'--resume: optimizer\.kind: "adamw" in the run, "adamw8bit" now'):
        run_training(config, resume=True)
    run_training(load_config(tmp_path / "run" / "config.yaml").config, resume=True)
    assert_equal_runs(tmp_path / "plain", tmp_path / "run")

"""An 8-bit optimizer that does not work here: another one is used, and everything says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bitsandbytes.functional
import pytest

from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.errors import RunError, UserError
from sd3tune.training.loop import View

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

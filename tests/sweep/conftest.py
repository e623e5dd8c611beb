from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sd3tune.config import dump_config

QUICK_TRAINING = '''\
"""Stands for `sd3tune train`: its loss is a formula of the overrides, and pictures drift above a rate of 0.005. Each
start adds a line to OUTPUT_DIR.starts."""
import json, math, pathlib, signal, sys, time
from sd3tune.runtime.signals import stop_with_parent

values = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
run, lr = pathlib.Path(values["output_dir"]), float(values["optimizer.lr"])
with run.with_suffix(".starts").open("a") as starts:
    starts.write(json.dumps(sys.argv[1:]) + "\\n")
if lr > 0.5:
    print("error: optimizer.lr: far too large", flush=True)
    sys.exit(2)
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
stop_with_parent()
run.mkdir(exist_ok=True)
loss, lines = (math.log10(lr) + 3) ** 2 + 1 / int(values.get("method.rank", 1)), []
for step in range(1, 5):
    lines.append(json.dumps({"step": step, "loss": loss + 1 / step}))
    (run / "validation.jsonl").write_text("\\n".join(lines) + "\\n")
    time.sleep(float(values.get("seed", 0)) / 100)
best = {"step": 4, "loss": loss + 1 / 4}
drawn = None if lr > 0.005 else {"step": 4, "likeness": 1 - loss / 10, "prompt": 0.5}
report = {"held_out": {"best": best, "last": best}, "evaluation": {"best": drawn, "last": drawn}}
(run / "run.json").write_text(json.dumps({"sd3tune_run": 1, "argv": [], "report": report}))
'''
"""`seed` is the time of a step in hundredths of a second."""


@pytest.fixture
def quick_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let trials start a program of some milliseconds; returns it."""
    file = tmp_path / "quick_training.py"
    file.write_text(QUICK_TRAINING)
    monkeypatch.setattr("sd3tune.sweep.attempt.program", lambda: [sys.executable, str(file)])
    monkeypatch.setattr("sd3tune.sweep.workers._POLL", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return file


@pytest.fixture
def write_sweep(quick_config, tmp_path: Path) -> Callable[..., Path]:
    """`write_sweep("runs", axes=..., ...)`: a sweep's file, and the training that it names."""

    def write(folder: str, *overrides: str, **settings: object) -> Path:
        measured = ("validation={holdout: 2, every: 2}", *overrides)
        (tmp_path / "train.yaml").write_text(dump_config(quick_config(tmp_path / "unused", *measured)))
        file = tmp_path / f"{folder}.yaml"
        file.write_text(json.dumps({"config": "train.yaml", "output_dir": folder, **settings}))
        return file

    return write

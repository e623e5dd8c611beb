"""A callback of the package is a class and one entry in `CALLBACKS`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sd3tune.commands.train import run_training
from sd3tune.run.callbacks import wiring
from sd3tune.run.callbacks.base import RunCallback, Setup
from sd3tune.training.loop import View


class Counting(RunCallback):
    timing = "counting_s"
    closed: ClassVar[list[bool]] = []

    @classmethod
    def make(cls, setup: Setup) -> Counting | None:
        return cls() if setup.plan.config.seed == 7 else None

    def __call__(self, view: View) -> None:
        self.seconds += 1.0
        self.warnings += ["the last step"] if view.last else []

    def report(self) -> dict[str, Any]:
        return {"calls": self.seconds}

    def summary(self) -> list[str]:
        return [f"called {self.seconds:.0f} times"]

    def close(self, finished: bool) -> None:
        self.closed.append(finished)


@pytest.mark.parametrize("seed", [7, 8])
def test_one_entry_adds_a_callback(quick_config, tmp_path: Path, monkeypatch, capsys, seed: int) -> None:
    monkeypatch.setattr(wiring, "CALLBACKS", (*wiring.CALLBACKS, Counting))
    Counting.closed.clear()
    run_training(quick_config(tmp_path, f"seed={seed}", "train.steps=2"))
    described = json.loads((tmp_path / "run.json").read_text())
    wanted = seed == 7
    timings = {name: described["timings"][name] for name in ("validation_s", "preview_s", "counting_s")}
    assert timings == {"validation_s": 0.0, "preview_s": 0.0, "counting_s": 3.0 if wanted else 0.0}
    assert ("the last step" in described["warnings"]) == wanted
    assert described["report"].get("calls") == (3.0 if wanted else None)
    assert ("called 3 times" in capsys.readouterr().out.splitlines()) == wanted
    assert Counting.closed == [True] * wanted

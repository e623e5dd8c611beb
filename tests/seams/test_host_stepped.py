"""Any optimizer of torch's interface: it skips what is not finite, and a checkpoint holds all that it remembers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sd3tune.errors import RunError
from sd3tune.training.checkpoint import restore, save_checkpoint
from sd3tune.training.flat_master import FlatMaster, LossScale
from sd3tune.training.host_stepped import HostStepped
from sd3tune.training.step import TrainState, update

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Counting(torch.optim.SGD):
    """Remembers a number, which its steps depend on, and nothing before the first one."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (master,) = self.param_groups[0]["params"]
        self.state[master]["steps"] = self.state[master].get("steps", 0) + 1
        master.data -= 1e-3 * self.state[master]["steps"]
        super().step()


class Keeping(torch.optim.SGD):
    """Remembers a list."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (master,) = self.param_groups[0]["params"]
        self.state[master]["history"] = [1.0, 2.0]


MAKERS: dict[str, Make] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.1),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.1),
    "counting": lambda parameters: Counting(parameters, lr=0.1, momentum=0.9),
}


def state_of(make: Make) -> TrainState:
    master = FlatMaster({"a": nn.Parameter(torch.linspace(-1, 1, 8))}, torch.float32)
    optimizer = HostStepped(make([master.master]))
    return TrainState(0, master, optimizer, None, LossScale(torch.device("cpu"), enabled=False))


def advance(state: TrainState, config: Any, *values: float) -> torch.Tensor:
    for value in values:
        state.master.gradient.copy_(torch.linspace(-value, 2 * value, 8))
        update(state, config, 0.05, lambda gradient: gradient)
    return state.master.master.detach().clone()


def saved(state: TrainState, folder: Path) -> Path:
    return save_checkpoint(folder, state, {}, None, lambda folder: None)


@pytest.mark.parametrize("kind", MAKERS)
def test_it_skips_what_is_not_finite_and_goes_on_from_a_checkpoint(quick_config, tmp_path: Path, kind: str) -> None:
    config, make = quick_config(tmp_path), MAKERS[kind]
    straight, stopped, resumed = state_of(make), state_of(make), state_of(make)
    expected = advance(straight, config, 1.0, 0.5, 0.25, 0.125)
    advance(stopped, config, 1.0, float("nan"), 0.5, float("inf"))
    restore(saved(stopped, tmp_path), resumed)
    assert resumed.step == 4
    assert torch.equal(advance(resumed, config, 0.25, 0.125), expected)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.05
    assert not torch.equal(expected, advance(state_of(make), config, 0.25, 0.125))


def test_what_a_checkpoint_cannot_hold_is_named_and_nothing_is_written(quick_config, tmp_path: Path) -> None:
    state = state_of(lambda parameters: Keeping(parameters, lr=0.1))
    advance(state, quick_config(tmp_path), 1.0)
    with pytest.raises(RunError, match="optimizer: Keeping remembers 'history', and a checkpoint holds tensors"):
        saved(state, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[!.]*"))


def test_a_checkpoint_without_its_numbers_is_damaged(quick_config, tmp_path: Path) -> None:
    state = state_of(MAKERS["counting"])
    advance(state, quick_config(tmp_path), 1.0)
    file = saved(state, tmp_path) / "state.json"
    fields = json.loads(file.read_text())
    for numbers in (None, {}, {"state": {}, "group": [], "on_the_host": []}):
        file.write_text(json.dumps({**fields, "optimizer": numbers}))
        before = state_of(MAKERS["counting"])
        with pytest.raises(RunError, match=r"damaged \(state.json has no numbers of the optimizer\)"):
            restore(file.parent, before)
        assert before.step == 0

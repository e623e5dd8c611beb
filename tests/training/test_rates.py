"""Learning rates of single parameters on the flat master: LoRA+."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sd3tune.config import Config
from sd3tune.data.sampler import generator
from sd3tune.errors import UserError
from sd3tune.methods import METHODS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.training.flat_master import FlatMaster, LossScale
from sd3tune.training.optimizers import make_optimizer
from sd3tune.training.step import TrainState, update

RATIO, LR, STEPS = 16.0, 1e-3, 5
SHAPES = {"x.lora_A": (2, 8), "x.lora_B": (6, 2), "y.lora_A": (3, 8), "y.lora_B": (6, 3)}


def values(seed: int) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=generator(seed, name)) for name, shape in SHAPES.items()}


@pytest.fixture
def config(quick_config, tmp_path: Path) -> Callable[..., Config]:
    settings = (f"method.loraplus_lr_ratio={RATIO}", f"optimizer={{kind: adamw, lr: {LR}, weight_decay: 0.1}}")
    return lambda *more: quick_config(tmp_path, *settings, *more)


def state_of(config: Config) -> TrainState:
    rates = METHODS["lora"](config, resolve_base("tiny")).rates(SHAPES)
    master = FlatMaster({name: nn.Parameter(value) for name, value in values(0).items()}, torch.float32, rates=rates)
    scale = LossScale(torch.device("cpu"), enabled=False)
    return TrainState(0, master, make_optimizer(config.optimizer, master.master), None, scale)


def test_b_is_updated_at_its_own_rate_as_by_torchs_adamw(config) -> None:
    settings = config("train.max_grad_norm=null")
    state = state_of(settings)
    expected = {name: nn.Parameter(value) for name, value in values(0).items()}
    groups = [{"params": [p], "lr": LR * (RATIO if name.endswith("B") else 1)} for name, p in expected.items()]
    reference = torch.optim.AdamW(groups, weight_decay=0.1)
    for step in range(1, STEPS + 1):
        gradients = values(step)
        for name, gradient in gradients.items():
            expected[name].grad = gradient.clone()
        reference.step()
        state.master.gradient.copy_(torch.cat([gradient.flatten() for gradient in gradients.values()]))
        update(state, settings, LR, lambda gradient: gradient)
    for name, value in state.master.named(state.master.master).items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing(config) -> None:
    state = state_of(config())
    before = state.master.master.detach().clone()
    state.master.gradient.fill_(float("inf"))
    update(state, config(), LR, lambda gradient: gradient)
    assert torch.equal(state.master.master.detach(), before)


def test_it_is_part_of_the_run_and_needs_the_whole_update(config, quick_config, tmp_path: Path) -> None:
    method, plain = (METHODS["lora"](one, resolve_base("tiny")) for one in (config(), quick_config(tmp_path)))
    assert method.title() == "lora, rank 2, B at 16 x the learning rate"
    assert (method.identity()["loraplus_lr_ratio"], method.contract()["loraplus_lr_ratio"]) == (RATIO, RATIO)
    assert "loraplus_lr_ratio" not in plain.identity()
    assert plain.rates(SHAPES) == {}
    with pytest.raises(
        UserError, match=r"train.fused_backward is true, and method.text_encoders or method.loraplus_lr_ratio"
    ):
        config("train={fused_backward: true, max_grad_norm: null, steps: 3}")

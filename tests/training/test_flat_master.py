"""The flat master, schedules in closed form, clipping and loss scaling: against torch or a plain loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sd3tune.config.sections.schedule import ConstantConfig, CosineConfig
from sd3tune.config.sections.train import EmaConfig
from sd3tune.forecast.footprint import Footprint
from sd3tune.training.flat_master import (
    GROWTH_INTERVAL,
    MIN_LOSS_SCALE,
    NORM_CHUNK,
    FlatMaster,
    LossScale,
    clip_,
    ema_decay,
)
from sd3tune.training.schedules import learning_rate

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}


def make_parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_are_views_of_one_buffer(dtype: torch.dtype) -> None:
    parameters = make_parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    master = FlatMaster(parameters, dtype)
    buffer = master.compute.untyped_storage().data_ptr()
    for name, parameter in parameters.items():
        assert parameter.untyped_storage().data_ptr() == buffer
        assert torch.equal(parameter, before[name].to(dtype))
    assert master.master.dtype == torch.float32
    assert master.master.numel() == sum(parameter.numel() for parameter in parameters.values())


def test_fp32_keeps_no_second_copy() -> None:
    master = FlatMaster(make_parameters(), torch.float32)
    assert master.compute.data_ptr() == master.master.data_ptr()


def test_there_are_never_more_than_two_copies_in_fp32() -> None:
    with Footprint() as footprint:
        parameters = {name: nn.Parameter(torch.zeros(1 << 16)) for name in "ab"}
        copy = footprint.now
        FlatMaster(parameters, torch.bfloat16, accumulates=False)
    assert footprint.peak == 2 * copy


def test_low_precision_starts_from_unrounded_values() -> None:
    parameters = make_parameters()
    exact = torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()])
    master = FlatMaster(parameters, torch.bfloat16)
    assert torch.equal(master.master, exact)
    assert not torch.equal(master.compute.float(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_sees_the_masters_values_once_published(dtype: torch.dtype) -> None:
    parameters = make_parameters()
    master = FlatMaster(parameters, dtype)
    with torch.no_grad():
        master.master.mul_(3)
    master.publish()
    for name, value in master.named(master.master).items():
        assert torch.equal(parameters[name], value.to(dtype))


def test_a_module_that_was_cast_is_noticed() -> None:
    parameters = make_parameters()
    module = nn.ParameterDict(parameters)
    master = FlatMaster(parameters, torch.float32)
    master.publish()
    module.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="moved or cast"):
        master.publish()


def test_gradients_are_summed_in_fp32_and_cleared() -> None:
    parameters = make_parameters()
    master = FlatMaster(parameters, torch.bfloat16)
    for size in (1.0, 2.0**-12):  # the second would vanish beside the first in bf16
        for parameter in parameters.values():
            parameter.grad = torch.full_like(parameter, size)
        master.collect_gradients()
        assert all(parameter.grad is None for parameter in parameters.values())
    assert torch.equal(master.gradient, torch.full_like(master.gradient, 1 + 2.0**-12))


def test_a_parameter_without_a_gradient_counts_as_zero() -> None:
    parameters = make_parameters()
    master = FlatMaster(parameters, torch.float32)
    parameters["b"].grad = torch.ones(5)
    master.collect_gradients()
    gradients = master.named(master.gradient)
    assert torch.equal(gradients["b"], torch.ones(5))
    assert not gradients["a"].any()
    assert not gradients["c"].any()


def test_named_views_have_names_and_shapes() -> None:
    master = FlatMaster(make_parameters(), torch.float32)
    assert {name: tuple(view.shape) for name, view in master.named(master.master).items()} == SHAPES


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_agrees_with_torch(max_norm: float) -> None:
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    parameter = nn.Parameter(torch.zeros(1000))
    parameter.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_([parameter], max_norm)
    norm = clip_(gradient, max_norm)
    assert torch.equal(norm, expected)
    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=0)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_the_norm_is_one_kernel_whatever_the_size() -> None:
    with Operations() as operations:
        norm = clip_(torch.empty(100 * NORM_CHUNK, device="meta"), None)
    assert operations.names == ["empty", "linalg_vector_norm"]
    assert (norm.shape, norm.dtype) == ((), torch.float32)


def test_on_the_cpu_the_norm_of_many_values_is_exact() -> None:
    gradient = torch.rand(40 * NORM_CHUNK + 7, generator=torch.Generator().manual_seed(1))
    exact = gradient.double().norm().item()
    assert clip_(gradient, None).item() == pytest.approx(exact, rel=1e-7)


def test_without_a_limit_the_gradient_is_left_alone() -> None:
    gradient = torch.full((4,), 100.0)
    assert clip_(gradient, None) == 200
    assert torch.equal(gradient, torch.full((4,), 100.0))


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_constant_rises_to_the_peak_and_stays(warmup: int) -> None:
    rates = [learning_rate(ConstantConfig(warmup_steps=warmup), 1e-3, step, 30) for step in range(30)]
    assert rates == [pytest.approx(1e-3 * min(1.0, (step + 1) / warmup if warmup else 1)) for step in range(30)]


def test_cosine_agrees_with_torch() -> None:
    rates = [learning_rate(CosineConfig(), 1e-3, step, 30) for step in range(30)]
    assert rates == pytest.approx(scheduled(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30), 30))


def test_cosine_with_warm_up_agrees_with_torch() -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 6, total_iters=5)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[6])

    rates = [learning_rate(CosineConfig(warmup_steps=6), 1e-3, step, 30) for step in range(30)]
    assert rates == pytest.approx(scheduled(schedule, 30))


def test_cosine_agrees_with_torchs_lambda_rule() -> None:
    def factor(step: int) -> float:
        return (step + 1) / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))

    rates = [learning_rate(CosineConfig(warmup_steps=4), 3e-4, step, 20) for step in range(20)]
    expected = scheduled(lambda o: torch.optim.lr_scheduler.LambdaLR(o, factor), 20, peak=3e-4)
    assert rates == pytest.approx(expected)


def scheduled(make, steps: int, peak: float = 1e-3) -> list[float]:
    """The rates that one of torch's schedulers gives, step by step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_ema_decay_warms_up_to_its_limit() -> None:
    decays = [ema_decay(EmaConfig(decay=0.9), step) for step in range(1, 200)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays == sorted(decays)
    assert decays[79] == pytest.approx(0.9)  # (1 + 80) / (10 + 80)
    assert set(decays[80:]) == {0.9}


def test_the_initial_weights_are_forgotten_within_a_thousand_steps() -> None:
    share = math.prod(ema_decay(EmaConfig(decay=0.9999), step) for step in range(1, 1001))
    assert share < 1e-20


def test_loss_scale_halves_on_overflow_and_grows_after_a_long_calm() -> None:
    scale = LossScale(torch.device("cpu"), enabled=True)
    start = scale.scale.item()
    scale.update(torch.tensor(True))
    assert scale.scale.item() == start / 2
    for _ in range(GROWTH_INTERVAL - 1):
        scale.update(torch.tensor(False))
    assert scale.scale.item() == start / 2
    scale.update(torch.tensor(False))
    assert scale.scale.item() == start
    assert scale.good_steps.item() == 0


def test_an_overflow_restarts_the_calm() -> None:
    scale = LossScale(torch.device("cpu"), enabled=True)
    for _ in range(5):
        scale.update(torch.tensor(False))
    scale.update(torch.tensor(True))
    assert scale.good_steps.item() == 0


def test_a_row_of_overflows_leaves_the_loss_scale_at_its_floor() -> None:
    """As torch's GradScaler down to it; from there it grows again."""
    scale = LossScale(torch.device("cpu"), enabled=True)
    for halvings in range(1, 200):
        scale.update(torch.tensor(True))
        assert scale.scale.item() == max(2.0 ** (16 - halvings), MIN_LOSS_SCALE)
    for _ in range(GROWTH_INTERVAL):
        scale.update(torch.tensor(False))
    assert scale.scale.item() == 2 * MIN_LOSS_SCALE


def test_loss_scale_is_one_and_stays_when_it_is_not_needed() -> None:
    scale = LossScale(torch.device("cpu"), enabled=False)
    scale.update(torch.tensor(True))
    assert scale.scale.item() == 1

"""Every optimizer against an independent one, with gradients that are not finite, and in what it remembers."""

from __future__ import annotations

import math

import bitsandbytes
import pytest
import torch
from prodigyopt import Prodigy
from torch import Tensor, nn

from sd3tune.config import Config
from sd3tune.config.sections.optimizer import AdamW8bitConfig, LionConfig, ProdigyConfig
from sd3tune.run.state import make_state
from sd3tune.training import optimizers
from sd3tune.training.flat_master import FlatMaster
from sd3tune.training.optimizers import OPTIMIZERS, make_adamw8bit, make_lion, make_prodigy, state_tensors
from sd3tune.training.step import TrainState, update

KINDS = sorted(OPTIMIZERS)
RATES = {"prodigy": 1.0, "adafactor": 0.3, "schedulefree": 0.3}
"""Suitable learning rates of the fixed problem, if not 3e-2."""
SIZES = {"a": (16, 40), "b": (5, 1000)}  # in all, no multiple of a block


@pytest.fixture
def config_of(quick_config, tmp_path):
    return lambda kind: quick_config(tmp_path / "run", f"optimizer={{kind: {kind}}}", "train.max_grad_norm=null")


def make(config: Config) -> TrainState:
    torch.manual_seed(0)
    parameters = {"a": nn.Parameter(0.1 * torch.randn(SIZES["a"])), "b": nn.Parameter(torch.zeros(SIZES["b"]))}
    return make_state(config, FlatMaster(parameters, torch.float32), torch.float32)


def rate_of(config: Config) -> float:
    return config.optimizer.lr


def advance(state: TrainState, config: Config, gradient: Tensor) -> None:
    state.master.gradient.copy_(gradient)
    update(state, config, rate_of(config), lambda tensor: tensor)


def everything(state: TrainState) -> dict[str, Tensor]:
    remembered = state_tensors(state.optimizer, state.master.master)
    return {"master": state.master.master.detach().clone(), **{name: one.clone() for name, one in remembered.items()}}


def gradients(count: int) -> list[Tensor]:
    size = sum(math.prod(shape) for shape in SIZES.values())
    source = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=source) for _ in range(count)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_might_as_well_not_have_been(config_of, kind: str, bad: float) -> None:
    config = config_of(kind)
    plain, disturbed = make(config), make(config)
    start = everything(plain)["master"]
    for number, gradient in enumerate(gradients(6)):
        if number in (0, 1, 4):
            before = everything(disturbed)
            poisoned = gradient.clone()
            poisoned[number] = bad
            advance(disturbed, config, poisoned)
            after = everything(disturbed)
            for name, tensor in before.items():
                assert torch.equal(after[name], tensor), name
        advance(plain, config, gradient)
        advance(disturbed, config, gradient)
        expected, found = everything(plain), everything(disturbed)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (number, name)
    assert not torch.equal(start, found["master"])


@pytest.mark.parametrize("kind", sorted(kind for kind, entry in OPTIMIZERS.items() if entry.skips_on_device))
def test_all_that_is_remembered_are_tensors_on_the_masters_device(config_of, kind: str) -> None:
    config = config_of(kind)
    state = make(config)
    advance(state, config, gradients(1)[0])
    (group,) = state.optimizer.param_groups
    remembered = state.optimizer.state[state.master.master]
    assert all(isinstance(value, Tensor) and not value.requires_grad for value in remembered.values())
    assert len({value.untyped_storage().data_ptr() for value in remembered.values()}) == len(remembered)
    advance(state, config, gradients(2)[1])
    assert {key: value for key, value in group.items() if key != "params"} == {
        key: value for key, value in state.optimizer.param_groups[0].items() if key != "params"
    }


def descend(config: Config, steps: int) -> list[float]:
    """The losses of a fixed least-squares problem, badly scaled."""
    state, source = make(config), torch.Generator().manual_seed(2)
    size = len(state.master.master)
    target, scale = torch.randn(size, generator=source), torch.logspace(-2, 2, size)
    losses = []
    for _ in range(steps):
        error = state.master.master.detach() - target
        losses.append((scale * (state.result() - target) ** 2).mean().item())
        advance(state, config, 2 * scale * error / size)
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_fixed_problem_falls(quick_config, tmp_path, kind: str) -> None:
    rate = f"optimizer.lr={RATES.get(kind, 3e-2)}"
    config = quick_config(tmp_path / "run", f"optimizer={{kind: {kind}}}", rate, "train.max_grad_norm=null")
    losses = descend(config, 300)
    assert losses[-1] < 1e-2 * losses[0]


def test_eight_bits_train_like_thirty_two(quick_config, tmp_path) -> None:
    settings = ("optimizer.lr=3e-2", "train.max_grad_norm=null")
    exact, rounded = (
        descend(quick_config(tmp_path / "run", f"optimizer.kind={kind}", *settings), 100)
        for kind in ("adamw", "adamw8bit")
    )
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize(("size", "chunk"), [(4096, optimizers.CHUNK), (5000, optimizers.CHUNK), (5000, 512)])
def test_adamw8bit_is_that_of_bitsandbytes(size: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, where theirs quantises, from 4096 values on; in chunks, too, the last of them partly filled."""
    monkeypatch.setattr(optimizers, "CHUNK", chunk)
    source = torch.Generator().manual_seed(3)
    start = 0.1 * torch.randn(size, generator=source)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    config = AdamW8bitConfig(lr=1e-3, betas=[0.8, 0.99], eps=1e-7, weight_decay=0.02)
    optimizer = make_adamw8bit(config, ours)
    optimizer.found_inf = torch.zeros(())
    reference = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-3, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.02)
    for number in range(20):
        gradient = 1e-3 * torch.randn(size, generator=source)
        if number == 0:
            gradient[: size // 2] = 0  # as LoRA's A has none in the first step: whole blocks of zeros
        ours.grad, theirs.grad = gradient, gradient.clone()
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 1e-3 / (1 + number)
        optimizer.step()
        reference.step()
    found, expected = optimizer.state[ours], reference.state[theirs]
    assert found["step"].item() == expected["step"]
    assert found["state1"].dtype == found["state2"].dtype == torch.uint8
    assert {name for name in expected if name != "step"} < found.keys()
    for name in ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"):
        assert torch.equal(found[name], expected[name]), name
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def test_eight_bit_moments_take_two_bytes_a_parameter(config_of) -> None:
    """However small the adapter: bitsandbytes' own leaves fewer than 4096 values in fp32."""
    config = config_of("adamw8bit")
    torch.manual_seed(0)
    state = make_state(config, FlatMaster({"a": nn.Parameter(torch.randn(300))}, torch.float32), torch.float32)
    remembered = state.optimizer.state[state.master.master]
    assert remembered["state1"].dtype == remembered["state2"].dtype == torch.uint8
    assert remembered["state1"].numel() == remembered["state2"].numel() == 300
    assert remembered["absmax1"].numel() == 2


@pytest.mark.parametrize("safeguard_warmup", [False, True])
@pytest.mark.parametrize("use_bias_correction", [False, True])
def test_prodigy_is_that_of_its_authors(safeguard_warmup: bool, use_bias_correction: bool) -> None:
    """Theirs over tensors of their own, ours on one flat tensor; in float64, through a warm-up."""
    source = torch.Generator().manual_seed(4)
    start, target = (torch.randn(300, generator=source).double() for _ in range(2))
    start *= 0.1
    start[200:] = 0  # as LoRA's B
    options = {
        "d0": 1e-5, "d_coef": 0.7, "weight_decay": 0.01, "eps": 1e-8,
        "safeguard_warmup": safeguard_warmup, "use_bias_correction": use_bias_correction,
    }  # fmt: skip
    ours = nn.Parameter(start.clone())
    optimizer = make_prodigy(ProdigyConfig(betas=[0.9, 0.99], **options), ours)
    optimizer.found_inf = torch.zeros(())
    parts = [nn.Parameter(part.clone()) for part in start.split(100)]
    reference = Prodigy(parts, lr=1.0, betas=(0.9, 0.99), **options)
    grown = 0
    for number in range(120):
        rate = min(1.0, (number + 1) / 10)
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = rate
        ours.grad = (ours - target).detach()
        for part, goal in zip(parts, target.split(100), strict=True):
            part.grad = (part - goal).detach()
        before = reference.param_groups[0]["d"]
        optimizer.step()
        reference.step()
        grown += reference.param_groups[0]["d"] > before
        assert optimizer.state[ours]["d"].item() == pytest.approx(reference.param_groups[0]["d"], rel=1e-9)
        torch.testing.assert_close(ours.detach(), torch.cat(parts).detach(), rtol=0, atol=1e-9)
    assert grown >= 10
    assert reference.param_groups[0]["d"] > 100 * 1e-5


def test_prodigy_waits_for_the_first_gradient(config_of) -> None:
    config = config_of("prodigy")
    state = make(config)
    before = everything(state)
    advance(state, config, torch.zeros_like(state.master.gradient))
    assert state.optimizer.state[state.master.master]["d"].item() == config.optimizer.d0
    torch.testing.assert_close(state.master.master.detach(), before["master"], rtol=1e-6, atol=0)


def test_lion_is_that_of_bitsandbytes() -> None:
    source = torch.Generator().manual_seed(5)
    start = 0.1 * torch.randn(5000, generator=source)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = make_lion(LionConfig(lr=1e-3, betas=[0.8, 0.95], weight_decay=0.02), ours)
    optimizer.found_inf = torch.zeros(())
    reference = bitsandbytes.optim.Lion32bit([theirs], lr=1e-3, betas=(0.8, 0.95), weight_decay=0.02)
    for number in range(20):
        ours.grad = 1e-3 * torch.randn(5000, generator=source)
        theirs.grad = ours.grad.clone()
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 1e-3 / (1 + number)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(optimizer.state[ours]["exp_avg"], reference.state[theirs]["state1"], rtol=0, atol=1e-9)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_lion_in_slices_is_lion_as_a_whole() -> None:
    """So that `train.fused_backward` may take it."""
    start, gradient = torch.randn(2, 1024, generator=torch.Generator().manual_seed(6))
    whole, sliced = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers_of = [make_lion(LionConfig(), master) for master in (whole, sliced)]
    for number in range(3):
        whole.grad, optimizers_of[0].found_inf = gradient / (1 + number), torch.zeros(())
        optimizers_of[0].step()
        for first in (512, 0, 256, 768):  # in any order
            optimizers_of[1].update_slice(first, whole.grad[first : first + 256].clone())
        optimizers_of[1].finish()
        assert torch.equal(whole, sliced)
    assert torch.equal(optimizers_of[0].state[whole]["exp_avg"], optimizers_of[1].state[sliced]["exp_avg"])

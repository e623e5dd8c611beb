"""Optimizers of torch, schedulefree and bitsandbytes on the flat master: they do what they do by themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator

import bitsandbytes
import pytest
import schedulefree
import torch
from torch import Tensor, nn

from sd3tune.config.sections import optimizer as sections
from sd3tune.errors import ConfigError, RunError
from sd3tune.run.preflight import check_installed
from sd3tune.run.state import make_state
from sd3tune.training.checkpoint import restore, save_checkpoint
from sd3tune.training.flat_master import FlatMaster
from sd3tune.training.optimizers import OPTIMIZERS, make_optimizer, state_tensors
from sd3tune.training.step import TrainState, update

SHAPES = {"down": (4, 96), "up": (80, 4), "bias": (80,), "conv": (8, 3, 2, 2)}
STEPS = 12


def parameters() -> dict[str, nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    made = {name: 0.1 * torch.randn(shape, generator=source) for name, shape in SHAPES.items()}
    made["up"].zero_()  # as LoRA's B
    return {name: nn.Parameter(tensor) for name, tensor in made.items()}


def gradients() -> Iterator[dict[str, Tensor]]:
    source = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield {name: 1e-2 * torch.randn(shape, generator=source) for name, shape in SHAPES.items()}


def trained(settings: sections.OptimizerSection) -> tuple[FlatMaster, torch.optim.Optimizer]:
    """The flat master after some steps with the rates 1e-3, 1e-3 / 2, 1e-3 / 3, ..."""
    master = FlatMaster(parameters(), torch.float32)
    optimizer = make_optimizer(settings, master.master, master.named(master.master))
    optimizer.found_inf = torch.zeros(())
    for number, gradient in enumerate(gradients(), 1):
        optimizer.param_groups[0]["lr"] = 1e-3 / number
        master.master.grad = torch.cat([part.reshape(-1) for part in gradient.values()])
        optimizer.step()
    return master, optimizer


def reference(*optimizers: torch.optim.Optimizer, of: dict[str, nn.Parameter]) -> None:
    for number, gradient in enumerate(gradients(), 1):
        for name, parameter in of.items():
            parameter.grad = gradient[name].clone()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / number
            optimizer.step()


def assert_same(master: FlatMaster, expected: dict[str, nn.Parameter], flat: Tensor | None = None) -> None:
    for name, value in master.named(master.master if flat is None else flat).items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-5, atol=1e-8, msg=name)


def test_muon_is_torchs_on_each_matrix_and_adamw_elsewhere() -> None:
    settings = sections.MuonConfig(weight_decay=0.05, momentum=0.9, ns_steps=4)
    master, optimizer = trained(settings)
    expected = parameters()
    matrices, others = [expected["down"], expected["up"]], [expected["bias"], expected["conv"]]
    muon = torch.optim.Muon(matrices, weight_decay=0.05, momentum=0.9, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, weight_decay=0.05)
    reference(muon, adamw, of=expected)
    assert_same(master, expected)
    state = state_tensors(optimizer, master.master)
    assert torch.equal(state["down.momentum_buffer"], muon.state[expected["down"]]["momentum_buffer"])
    assert {"bias.exp_avg", "conv.exp_avg_sq"} < state.keys()


def test_muon_moves_a_matrix_by_about_adamws_step() -> None:
    """In the root mean square, 0.2 to 0.4 times the learning rate."""
    matrix = nn.Parameter(torch.zeros(64, 32))
    (optimizer,) = OPTIMIZERS["muon"].make(sections.MuonConfig(lr=1.0), {"a": matrix})
    matrix.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert 0.1 < matrix.detach().square().mean().sqrt().item() < 0.4


def test_adafactor_is_torchs_and_moves_a_zero_matrix() -> None:
    settings = sections.AdafactorConfig(smallest_scale=1e-2, clip=1.1, weight_decay=0.01)
    master, optimizer = trained(settings)
    expected = parameters()
    theirs = torch.optim.Adafactor(expected.values(), eps=(None, 1e-2), d=1.1, weight_decay=0.01)
    reference(theirs, of=expected)
    assert_same(master, expected)
    state = state_tensors(optimizer, master.master)
    assert state["up.row_var"].shape == (80, 1)
    assert state["up.col_var"].shape == (1, 4)
    assert master.named(master.master)["up"].any()


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1536, 16), (7,)])
@pytest.mark.parametrize("kind", sorted(kind for kind, entry in OPTIMIZERS.items() if entry.matrix_values))
def test_the_state_of_a_matrix_has_as_many_values_as_the_plan_counts(kind: str, shape: tuple[int, ...]) -> None:
    master = FlatMaster({"a": nn.Parameter(torch.ones(shape))}, torch.float32)
    settings = {"muon": sections.MuonConfig, "adafactor": sections.AdafactorConfig}[kind]()
    optimizer = make_optimizer(settings, master.master, master.named(master.master))
    optimizer.found_inf = torch.zeros(())
    master.master.grad = torch.ones(math.prod(shape))
    optimizer.step()
    found = sum(value.numel() for value in state_tensors(optimizer, master.master).values() if value.ndim)
    assert OPTIMIZERS[kind].matrix_values(torch.Size(shape)) == found


def test_schedule_free_is_that_of_its_authors_and_exports_their_average() -> None:
    settings = sections.ScheduleFreeConfig(betas=[0.8, 0.99], weight_decay=0.02, r=0.5)
    master, optimizer = trained(settings)
    expected = parameters()
    theirs = schedulefree.AdamWScheduleFree(expected.values(), betas=(0.8, 0.99), weight_decay=0.02, r=0.5)
    theirs.train()
    reference(theirs, of=expected)
    assert_same(master, expected)
    raw = master.master.detach().clone()
    theirs.eval()
    assert_same(master, expected, optimizer.result())
    assert torch.equal(master.master.detach(), raw)
    assert not torch.allclose(optimizer.result(), raw)


def test_paged_adamw8bit_is_bitsandbytes_own() -> None:
    start, source = 0.1 * torch.randn(5000), torch.Generator().manual_seed(3)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = make_optimizer(sections.PagedAdamW8bitConfig(lr=1e-3), ours)
    optimizer.found_inf = torch.zeros(())
    expected = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-3, weight_decay=1e-4)
    for _ in range(5):
        ours.grad = 1e-3 * torch.randn(5000, generator=source)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        expected.step()
    assert torch.equal(ours, theirs)
    assert state_tensors(optimizer, ours)["state1"].dtype == torch.uint8


def test_state_that_exists_is_restored_in_place(quick_config, tmp_path) -> None:
    """On a GPU it lies in pages that only the library can allocate."""
    config = quick_config(tmp_path, "optimizer={kind: paged_adamw8bit}")
    old, new = (
        make_state(config, FlatMaster({"a": nn.Parameter(torch.ones(5000))}, torch.float32), torch.float32)
        for _ in (0, 1)
    )
    old.master.gradient.fill_(0.1)
    update(old, config, 1e-3, lambda gradient: gradient)
    before = state_tensors(new.optimizer, new.master.master)["state1"]
    restore(save_checkpoint(tmp_path, old, {}, None, lambda folder: None), new)
    after = state_tensors(new.optimizer, new.master.master)["state1"]
    assert after is before
    assert after.any()


def test_a_checkpoint_with_state_of_other_matrices_is_refused(quick_config, tmp_path, monkeypatch) -> None:
    config = quick_config(tmp_path, "optimizer={kind: muon}")

    def make(name: str) -> TrainState:
        return make_state(config, FlatMaster({name: nn.Parameter(torch.ones(3, 4))}, torch.float32), torch.float32)

    old, new = make("a"), make("b")
    old.master.gradient.fill_(0.1)
    update(old, config, 1e-3, lambda gradient: gradient)
    old.master.shapes = new.master.shapes
    folder = save_checkpoint(tmp_path, old, {}, None, lambda folder: None)
    before = new.master.master.detach().clone()
    with pytest.raises(RunError, match=r"optimizer\.a\.momentum_buffer: not a value of this run"):
        restore(folder, new)
    assert torch.equal(new.master.master.detach(), before)


def test_a_torch_without_muon_is_told_apart(quick_config, tmp_path, monkeypatch) -> None:
    config = quick_config(tmp_path, "optimizer={kind: muon}")
    check_installed(config)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RunError, match=r"optimizer\.kind: muon needs torch 2\.9 or later, for torch\.optim\.Muon"):
        check_installed(config)


def test_schedule_free_takes_no_other_schedule(quick_config, tmp_path) -> None:
    quick_config(tmp_path, "optimizer={kind: schedulefree}", "schedule={kind: constant, warmup_steps: 1}")
    with pytest.raises(ConfigError, match=r"optimizer\.kind is schedulefree, which averages weights"):
        quick_config(tmp_path, "optimizer={kind: schedulefree}", "schedule={kind: cosine}")

"""Work on a Mac's GPU, which has no float64: on fake tensors of another device, as torch refuses the real one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd3tune.model.lora.layers import block_norms
from sd3tune.run.state import make_state
from sd3tune.training.flat_master import FlatMaster
from sd3tune.training.optimizers import WITHOUT_FLOAT64
from sd3tune.training.step import update

SHAPES = {"transformer_blocks.0.attn.to_q.lora_A": (4, 8), "transformer_blocks.0.attn.to_q.lora_B": (8, 4)}
MAC = torch.device("cuda")


class WithoutFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and tensor.device.type == MAC.type and tensor.dtype is torch.float64:
                raise TypeError(f"{func}: a Mac's GPU has no float64")
        return results


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert WITHOUT_FLOAT64 == ("mps",)
    monkeypatch.setattr("sd3tune.training.optimizers.WITHOUT_FLOAT64", (MAC.type,))
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutFloat64():
        yield


def test_a_blocks_change_is_computed_on_the_cpu(mac: None) -> None:
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):  # a fake tensor has no number
        block_norms({name: torch.empty(shape, device=MAC) for name, shape in SHAPES.items()})


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("kind", ["adamw", "prodigy"])
def test_an_optimizers_step_takes_fp32(mac: None, quick_config, tmp_path, kind: str) -> None:
    config = quick_config(tmp_path / "run", f"optimizer={{kind: {kind}}}")
    parameters = {name: nn.Parameter(torch.empty(shape, device=MAC)) for name, shape in SHAPES.items()}
    state = make_state(config, FlatMaster(parameters, torch.float32), torch.float32)
    for _ in range(2):
        norm = update(state, config, config.optimizer.lr, lambda gradient: gradient)
        assert norm.device.type == MAC.type
    remembered = state.optimizer.state[state.master.master]
    assert {tensor.dtype for tensor in remembered.values()} == {torch.float32}


def test_in_fp32_prodigy_keeps_its_course(monkeypatch: pytest.MonkeyPatch, quick_config, tmp_path) -> None:
    config = quick_config(tmp_path / "run", "optimizer={kind: prodigy}")
    steps = []
    for lacking in ((), ("cpu",)):
        monkeypatch.setattr("sd3tune.training.optimizers.WITHOUT_FLOAT64", (*WITHOUT_FLOAT64, *lacking))
        source = torch.Generator().manual_seed(0)
        parameters = {name: nn.Parameter(torch.randn(shape, generator=source)) for name, shape in SHAPES.items()}
        state = make_state(config, FlatMaster(parameters, torch.float32), torch.float32)
        for _ in range(20):
            state.master.gradient.copy_(torch.randn(64, generator=source))
            update(state, config, config.optimizer.lr, lambda gradient: gradient)
        steps.append(state.optimizer.state[state.master.master])
    exact, single = steps
    assert single["d"].dtype is torch.float32
    assert single["d"].item() == pytest.approx(exact["d"].item(), rel=1e-5)
    torch.testing.assert_close(single["exp_avg"], exact["exp_avg"], rtol=1e-5, atol=1e-9)

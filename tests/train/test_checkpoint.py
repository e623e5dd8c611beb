"""Checkpoints: whole or absent, the newest few, and equal after a round trip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sd3tune.config import Config
from sd3tune.errors import RunError
from sd3tune.jobs.train import make_state
from sd3tune.train.checkpoint import differences, list_checkpoints, read_state, restore, save_checkpoint
from sd3tune.train.optim import FlatMaster
from sd3tune.train.step import TrainState, update

IDENTITY = {"seed": 0, "train": {"batch_size": 1}}


@pytest.fixture
def config(quick_config, tmp_path) -> Config:
    return quick_config(tmp_path / "run", "ema={decay: 0.9}")


@pytest.fixture(params=["adamw", "adamw8bit", "prodigy"])
def any_config(request, quick_config, tmp_path) -> Config:
    return quick_config(tmp_path / "run", "ema={decay: 0.9}", f"optimizer={{kind: {request.param}}}")


def make(config: Config, dtype=torch.float32, size=6) -> TrainState:
    torch.manual_seed(0)
    parameters = {"a": nn.Parameter(torch.randn(size)), "b": nn.Parameter(torch.randn(2, 3))}
    return make_state(config, FlatMaster(parameters, dtype), dtype)


def advance(state: TrainState, config: Config, steps: int) -> None:
    """Steps with gradients that follow from the step number."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        state.master.gradient.copy_(torch.randn(len(state.master.master), generator=generator))
        update(state, config, 1e-2, lambda tensor: tensor)


def save(run: Path, state: TrainState, keep: int = 3) -> Path:
    return save_checkpoint(run, state, IDENTITY, keep, lambda folder: (folder / "adapter").mkdir())


def tensors_of(state: TrainState) -> dict[str, torch.Tensor]:
    optimizer = state.optimizer.state[state.master.master]
    scale = {"scale": state.loss_scale.scale, "good": state.loss_scale.good_steps}
    return {"master": state.master.master.detach(), "ema": state.ema, **optimizer, **scale}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_restored_state_goes_on_like_the_saved_one(any_config, tmp_path, dtype) -> None:
    config = any_config
    straight = make(config, dtype)
    advance(straight, config, 3)
    folder = save(tmp_path, straight)
    resumed = make(config, dtype)
    restore(folder, resumed)
    assert resumed.step == 3
    assert torch.equal(resumed.master.compute, straight.master.compute)
    advance(straight, config, 4)
    advance(resumed, config, 4)
    expected = tensors_of(straight)
    for name, tensor in tensors_of(resumed).items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_training_on_does_not_write_into_the_file(any_config, tmp_path) -> None:
    config = any_config
    state = make(config)
    advance(state, config, 2)
    folder = save(tmp_path, state)
    before = (folder / "state.safetensors").read_bytes()
    resumed = make(config)
    restore(folder, resumed)
    advance(resumed, config, 2)
    assert (folder / "state.safetensors").read_bytes() == before


def test_only_the_newest_are_kept(config, tmp_path) -> None:
    state = make(config)
    for _ in range(4):
        advance(state, config, 1)
        save(tmp_path, state, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000004"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_checkpoint_that_was_not_finished_is_not_one(config, tmp_path) -> None:
    state = make(config)
    advance(state, config, 1)

    def fail(folder: Path) -> None:
        assert folder.name.startswith(".tmp-")
        assert list_checkpoints(tmp_path) == []
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, state, IDENTITY, 3, fail)
    assert list_checkpoints(tmp_path) == []
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_steps_beyond_six_digits_stay_in_order(tmp_path) -> None:
    for step in (999_999, 1_000_000, 5):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000005.bak").mkdir()  # a user's own
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-000005", "step-999999", "step-1000000"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_one_line_and_a_way_out(config, tmp_path, file: str) -> None:
    state = make(config)
    advance(state, config, 1)
    folder = save(tmp_path, state)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"damaged.*delete this folder to resume from the one before") as caught:
        restore(folder, make(config))
    assert str(folder) in caught.value.problems[0]
    assert "\n" not in caught.value.problems[0]


def test_a_checkpoint_of_other_tensors_is_refused(config, tmp_path) -> None:
    state = make(config)
    advance(state, config, 1)
    folder = save(tmp_path, state)
    with pytest.raises(RunError, match="other trained tensors"):
        restore(folder, make(config, size=7))


def test_nothing_in_a_checkpoint_is_pickled(config, tmp_path) -> None:
    state = make(config)
    advance(state, config, 1)
    folder = save(tmp_path, state)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    assert json.loads((folder / "state.json").read_text()) == read_state(folder)
    assert read_state(folder)["identity"] == IDENTITY


def test_differences_name_the_keys_and_both_values() -> None:
    saved = {"seed": 0, "train": {"batch_size": 1, "steps": 10}, "ema": None}
    now = {"seed": 0, "train": {"batch_size": 2, "steps": 10}, "ema": {"decay": 0.9}}
    assert differences(saved, now) == [
        "train.batch_size: 1 in the run, 2 now",
        'ema: null in the run, {"decay": 0.9} now',
    ]
    assert differences(saved, saved) == []

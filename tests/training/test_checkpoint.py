"""Checkpoints: whole or absent, the newest few, and equal after a round trip."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sd3tune.config import Config
from sd3tune.errors import RunError
from sd3tune.run.state import make_state
from sd3tune.training.checkpoint import differences, list_checkpoints, read_state, restore, save_checkpoint
from sd3tune.training.flat_master import FlatMaster
from sd3tune.training.optimizers import OPTIMIZERS, state_tensors
from sd3tune.training.step import TrainState, update

IDENTITY = {"seed": 0, "train": {"batch_size": 1}}


@pytest.fixture
def config(quick_config, tmp_path) -> Config:
    return quick_config(tmp_path / "run", "ema={decay: 0.9}")


@pytest.fixture(params=sorted(OPTIMIZERS))
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
    optimizer = state_tensors(state.optimizer, state.master.master)
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


Tensors = dict[str, torch.Tensor]


def flip_a_bit(tensors: Tensors) -> None:
    tensors["ema"].view(torch.uint8)[0] ^= 1


DAMAGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "short": (
        lambda t: t.update({"optimizer.exp_avg": t["optimizer.exp_avg"][:3].clone()}),
        r"float32 \[3\], not float",
    ),
    "reshaped": (
        lambda t: t.update(master=t["master"].reshape(2, -1).clone()),
        r"master: float32 \[2, 6\], not float32",
    ),
    "another dtype": (lambda t: t.update(master=t["master"].half()), r"master: float16 \[12\], not float32 \[12\]"),
    "missing": (lambda t: t.pop("ema"), "ema: missing"),
    "unknown": (lambda t: t.update(more=torch.ones(1)), "more: not a tensor of this run"),
    "NaN": (lambda t: t["optimizer.exp_avg_sq"].fill_(torch.nan), "exp_avg_sq: not the bytes that were written"),
    "a flipped bit": (flip_a_bit, "ema: not the bytes that were written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tensor_is_named_before_any_is_used(config, tmp_path, damage: str) -> None:
    state = make(config)
    advance(state, config, 1)
    folder = save(tmp_path, state)
    change, message = DAMAGES[damage]
    tensors = load_file(folder / "state.safetensors")
    change(tensors)
    save_file(tensors, folder / "state.safetensors")
    resumed, untouched = make(config), tensors_of(make(config))
    with pytest.raises(RunError, match=rf"damaged .*{message}.*; delete this folder to resume from the one before"):
        restore(folder, resumed)
    assert resumed.step == 0
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in tensors_of(resumed).items())


def test_a_checkpoint_without_digests_is_accepted_where_its_values_are_finite(config, tmp_path) -> None:
    """As earlier versions wrote them."""
    state = make(config)
    advance(state, config, 1)
    folder = save(tmp_path, state)
    written = json.loads((folder / "state.json").read_text())
    assert written.pop("digests").keys() == load_file(folder / "state.safetensors").keys()
    (folder / "state.json").write_text(json.dumps(written))
    restore(folder, make(config))
    tensors = load_file(folder / "state.safetensors")
    tensors["master"][0] = torch.inf
    save_file(tensors, folder / "state.safetensors")
    with pytest.raises(RunError, match="master: holds values that are not finite"):
        restore(folder, make(config))


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "null", '{"step": "1", "identity": {}, "layout": {}}', '{"step": 1, "layout": {}}', "[" * 10**5],
)
def test_a_state_that_was_edited_is_one_line(config, tmp_path, text: str) -> None:
    state = make(config)
    advance(state, config, 1)
    folder = save(tmp_path, state)
    (folder / "state.json").write_text(text)
    with pytest.raises(RunError, match=r"damaged .*; delete this folder to resume from the one before"):
        read_state(folder)


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

"""Swapped blocks: the same results to the bit, in less memory, with each block copied as rarely as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from sd3tune.commands.train import run_training
from sd3tune.errors import ConfigError, UserError
from sd3tune.forecast.footprint import bytes_of, tensors_of
from sd3tune.forecast.forecast import forecast, forecast_inputs
from sd3tune.model.compute import swap
from sd3tune.model.compute.swap import swapped_blocks, swapped_weights
from sd3tune.model.load.quantized import statistics
from sd3tune.run.preflight import make_plan
from sd3tune.run.setup import load_base, make_trainable
from sd3tune.training.flat_master import FlatMaster
from sd3tune.training.loop import View

ALL = "train.swap_blocks=4"
EVERYTHING = (
    "train.steps=4", "checkpoint={every: 2, keep: 9}", "ema={decay: 0.5}", "validation={holdout: 1, every: 2}",
    "preview={every: 2, prompts: [a photo of sks dog], steps: 2, seed: 11}",
    "data.sources.0.prior={kind: prediction, prompt: a dog, weight: 0.5}",
)  # fmt: skip


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks whose weights are copied to the device, in order: their numbers among the swapped ones."""
    seen: list[int] = []
    fill = swap._Buffer.fill

    def counted(buffer: swap._Buffer, index: int, pieces: Sequence[Tensor]) -> None:
        if buffer._holds != index:
            seen.append(index)
        fill(buffer, index, pieces)

    monkeypatch.setattr(swap._Buffer, "fill", counted)
    return seen


@pytest.mark.long
def test_whole_runs_are_equal_to_the_byte_and_resume_with_another_number(
    quick_config, tmp_path: Path, assert_equal_runs
) -> None:
    run_training(quick_config(tmp_path / "plain", *EVERYTHING))

    def stop(view: View) -> None:
        if view.step == 3:
            raise InterruptedError

    swapped = tmp_path / "swapped"
    with pytest.raises(InterruptedError):
        run_training(quick_config(swapped, *EVERYTHING, ALL), callbacks=[stop])
    run_training(quick_config(swapped, *EVERYTHING, "train.swap_blocks=3"), resume=True)
    assert_equal_runs(tmp_path / "plain", swapped)
    for name in ("step-000004-0.png", "base-0.png"):
        assert (tmp_path / "plain" / "samples" / name).read_bytes() == (swapped / "samples" / name).read_bytes()
    assert (tmp_path / "plain" / "validation.jsonl").read_text() == (swapped / "validation.jsonl").read_text()


SETTINGS = {
    "plain": ("train.fast_path=false", "train.hoist=false"),
    "fast": (),
    "block": ("train.gradient_checkpointing=block",),
    "selective": ("train.gradient_checkpointing=selective", "train.checkpointed_blocks=3"),
    "last blocks": ("method.blocks=[2, 3]",),
    "adaLN": ("method.targets=[norm1.linear, attn.to_q, ff.net.2]",),
    "nf4": ("model.quantize=nf4", "train.gradient_checkpointing=block"),
    "int8": ("model.quantize=int8",),
}


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(5)
    return {
        "hidden_states": torch.randn(2, 16, 8, 8, generator=source),
        "timestep": torch.tensor([400.0, 100.0]),
        "encoder_hidden_states": torch.randn(2, 93, 64, generator=source),
        "pooled_projections": torch.randn(2, 48, generator=source),
    }


@pytest.fixture
def computed(quick_config, tmp_path: Path, inputs) -> Callable[..., list[Tensor]]:
    """`computed("key=value", ...)`: outputs and gradients of two micro-steps, with an output without gradients between.

    All weights of the adapter are random, as gradients of new ones are mostly zero.
    """

    def compute(*settings: str) -> list[Tensor]:
        config = quick_config(tmp_path, *settings)
        plan = make_plan(config, torch.device("cpu"), resume=None)
        transformer = load_base(plan)
        master = FlatMaster(make_trainable(config, plan.method, transformer), plan.dtype)
        master.master.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
        master.publish()
        found = []
        for _ in range(2):
            output = transformer(**inputs).sample
            output.square().mean().backward()
            master.collect_gradients()
            with torch.no_grad():
                found += [output.detach(), master.gradient.clone(), transformer(**inputs).sample]
        return found

    return compute


@pytest.mark.parametrize("name", SETTINGS)
def test_outputs_and_gradients_are_equal_to_the_bit(name: str, computed) -> None:
    settings = SETTINGS[name]
    if any("quantize" in setting for setting in settings):
        pytest.importorskip("bitsandbytes")
    plain = computed(*settings)
    assert all(of.abs().max() > 0 for of in plain)
    for count in (3, 4) if name == "fast" else (4,):
        swapped = computed(*settings, f"train.swap_blocks={count}")
        assert all(map(torch.equal, swapped, plain)), count


@pytest.mark.parametrize("to_the_end", [False, True], ids=["", "recomputed to the end"])
@pytest.mark.parametrize("kind", ["none", "block", "selective"])
def test_a_block_is_copied_once_a_pass_and_not_where_the_passes_meet(
    kind: str, to_the_end: bool, computed, copies: list[int]
) -> None:
    with set_checkpoint_early_stop(not to_the_end):
        computed(ALL, f"train.gradient_checkpointing={kind}")
    forward, backward, alone = [2, 3], [1, 0], [2, 3, 0, 1]
    assert copies == [0, 1, *forward, *backward, *alone, *forward, *backward, *alone]


def test_the_device_holds_two_of_the_swapped_blocks(quick_config, tmp_path: Path) -> None:
    plain, swapped = (
        load_base(make_plan(quick_config(tmp_path, *settings), torch.device("cpu"), resume=None))
        for settings in ((), (ALL,))
    )
    blocks = [sum(weight.nbytes for weight in swapped_weights(block)) for block in plain.transformer_blocks]
    held = bytes_of(tensors_of(swapped))
    assert held == bytes_of(tensors_of(plain)) - sum(blocks) + max(blocks[0::2]) + max(blocks[1::2])


@pytest.mark.parametrize(("form", "hoisted"), [("none", "false"), ("nf4", "true")])
def test_the_forecast_counts_them_to_the_byte(quick_config, tmp_path: Path, form: str, hoisted: str) -> None:
    if form != "none":
        pytest.importorskip("bitsandbytes")
    settings = (f"model.quantize={form}", f"train.hoist={hoisted}", "data.sources.0.prior={prompt: a dog, images: 2}")
    plain, swapped = (
        forecast(forecast_inputs(quick_config(tmp_path, *settings, *more), torch.float32)) for more in ((), (ALL,))
    )
    plan = make_plan(quick_config(tmp_path, *settings, ALL), torch.device("cpu"), resume=None)
    transformer = load_base(plan)
    assert swapped.training.frozen == bytes_of([*tensors_of(transformer), *statistics(transformer)])
    saved = plain.training.frozen - swapped.training.frozen
    assert saved > 0
    assert plain.training.resident - swapped.training.resident == saved
    assert plain.drawing is not None
    assert swapped.drawing is not None
    assert plain.drawing.resident - swapped.drawing.resident == saved
    assert plain.training.working == swapped.training.working


def test_they_are_spread_over_the_model() -> None:
    assert swapped_blocks(24, 6) == [0, 4, 8, 12, 16, 20]
    assert swapped_blocks(38, 38) == list(range(38))
    assert swapped_blocks(4, 3) == [0, 1, 2]


def test_pieces_are_powers_of_two_that_waste_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory of another size is rounded up to such a power by torch."""
    made: list[int] = []
    empty = torch.empty

    def pageable(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        made.append(size)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", pageable)
    packed = torch.arange(11 * 2**20 + 512).to(torch.uint8)
    assert torch.equal(torch.cat(swap._pinned(packed)), packed)
    assert made == [8 * 2**20, 2 * 2**20, 2**20, 512]


def test_what_cannot_be_swapped_is_one_line(quick_config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"swap_blocks is 3 and method\.kind is full: .*leave train\.swap_blocks"):
        quick_config(tmp_path, "method={kind: full}", "train.swap_blocks=3")
    with pytest.raises(ConfigError, match=r"train\.swap_blocks=2: 2 is too small; at least 3"):
        quick_config(tmp_path, "train.swap_blocks=2")
    config = quick_config(tmp_path, "train.swap_blocks=5")
    with pytest.raises(UserError, match=r"train\.swap_blocks: 5 of 4 blocks; at most 4, or null for none"):
        make_plan(config, torch.device("cpu"), resume=None)

"""Recomputed blocks: the same steps to the bit, whatever is kept, and attention computed as often as is said."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sd3tune.errors import UserError
from sd3tune.model.compute.checkpointing import checkpoint_blocks
from sd3tune.model.compute.fast import cpu, use_fast_path

KERNELS = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, cpu.OPERATION]
PRIOR = "data.sources.0.prior={kind: prediction, prompt: a dog, weight: 0.5}"


class Attended(TorchDispatchMode):
    """Counts the kernels of attention, forward and backward passes together."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def forwards(self) -> int:
        return sum(self.calls[kernel] for kernel in KERNELS)


@pytest.fixture
def trained(assembled, quick_config, tmp_path):
    """`trained(kind, blocks, fast, "key=value", ...)`: the weights after two steps, and attention's kernels."""

    def train(kind: str, blocks: int | None, fast: bool, *overrides: str) -> tuple[torch.Tensor, int]:
        training = assembled(quick_config(tmp_path / "run", "train.batch_size=2", *overrides))
        checkpoint_blocks(training.transformer, kind, blocks)
        if fast:
            use_fast_path(training.transformer)
        with Attended() as attended:
            training.step()
        training.step()
        return training.state.master.master.detach(), attended.forwards

    return train


EVERY = 4 + 2
"""Attentions of the tiny base: one in each of its four blocks, and a second one in two that are not the last."""


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_weights_are_equal_to_the_bit_and_selective_attends_once(trained, fast: bool) -> None:
    plain, once = trained("none", None, fast)
    assert once == EVERY
    for kind, blocks, calls in (
        ("block", None, 2 * EVERY),
        ("block", 3, 2 * EVERY - 1),
        ("selective", None, EVERY),
        ("selective", 1, EVERY),
    ):
        weights, counted = trained(kind, blocks, fast)
        assert counted == calls, (kind, blocks)
        assert torch.equal(weights, plain), (kind, blocks)


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        (("method.dropout=0.3",), EVERY),
        (("method={kind: full}",), EVERY),
        (("method.init=eva",), EVERY),
        (("model.dtype=bf16", PRIOR), 2 * EVERY),
        (("model.dtype=bf16", "data.resolution=384", "data.buckets=false"), EVERY),
    ],
    ids=["dropout", "full", "eva", "prior in bf16", "many tokens in bf16"],
)
def test_so_are_they_with_dropout_with_a_prior_and_in_bf16(trained, settings: tuple[str, ...], calls: int) -> None:
    """A prior of this kind asks the untrained base once more, without gradients."""
    plain, _ = trained("none", None, True, *settings)
    kept, counted = trained("selective", None, True, *settings)
    assert torch.equal(kept, plain)
    assert counted == calls


def test_more_blocks_than_there_are_is_one_line(assembled, quick_config, tmp_path) -> None:
    config = quick_config(tmp_path, "train.gradient_checkpointing=block", "train.checkpointed_blocks=5")
    with pytest.raises(UserError, match="checkpointed_blocks: 5 of 4 blocks; at most 4, or null for all"):
        assembled(config)
    with pytest.raises(UserError, match="checkpointed_blocks is 2 but gradient_checkpointing is none"):
        quick_config(tmp_path, "train.checkpointed_blocks=2")

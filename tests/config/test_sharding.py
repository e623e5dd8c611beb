"""Settings that `train.sharding` refuses, each by a line that names both keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd3tune.errors import ConfigError

FULL = "method={kind: full}"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (("model.quantize=nf4",), "model.quantize is nf4"),
        (("model.quantize=int8",), "model.quantize is int8"),
        (("train.compile=blocks",), "train.compile is blocks"),
        (("train.swap_blocks=3",), "train.swap_blocks is 3"),
        (("train.fused_backward=true", "train.max_grad_norm=null"), "train.fused_backward is true"),
        (("train.memory=24",), "train.memory is 24"),
        (("method={kind: lora, rank: auto, budget_mb: 1}",), "method.rank is auto"),
        (("eval={every: 2}",), "eval is on"),
        ((FULL, "optimizer={kind: muon}"), "optimizer.kind is muon"),
        ((FULL, "optimizer={kind: adamw8bit}"), "optimizer.kind is adamw8bit"),
        ((FULL, "optimizer={kind: prodigy}"), "optimizer.kind is prodigy"),
        ((FULL, "data.sources.0.prior={kind: prediction, prompt: a dog}"), "data.sources have a prior"),
        ((FULL, "data.sources.0.outside_target=base"), "data.sources have outside_target"),
    ],
)
def test_what_cannot_be_divided_is_refused(quick_config, tmp_path: Path, settings: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        quick_config(tmp_path, *settings, "train.sharding=fsdp")
    (line,) = raised.value.problems
    assert f"train.sharding is fsdp and {key}" in line
    assert line.endswith("or leave train.sharding out")
    quick_config(tmp_path, *settings)  # fits without


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_deepspeed_is_refused_with_what_to_use(quick_config, tmp_path: Path, sharding: str) -> None:
    with pytest.raises(ConfigError, match=f"train.sharding is {sharding}: .* set train.sharding=fsdp"):
        quick_config(tmp_path, f"train.sharding={sharding}")


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_updates_of_single_weights_can_be_divided(quick_config, tmp_path: Path, optimizer: str) -> None:
    quick_config(tmp_path, FULL, f"optimizer={{kind: {optimizer}}}", "train.sharding=fsdp")
    quick_config(tmp_path, "optimizer={kind: muon}", "train.sharding=fsdp")  # a LoRA is not divided

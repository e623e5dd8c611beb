"""What few blocks of a deep model are found to take is to the byte what all of them take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pytest
import torch

from sd3tune.config import parse_config
from sd3tune.forecast import footprint, thinning
from sd3tune.forecast.rehearsal import Training, rehearse_drawing, rehearse_training
from sd3tune.methods import METHODS
from sd3tune.model.base.resolve import shape_of_base
from sd3tune.model.compute.hoist import hoist, hoisted
from sd3tune.model.load.components import load_transformer

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
SD35_LARGE = "stabilityai/stable-diffusion-3.5-large"
PREVIEW = {"preview": {"prompts": ["a dog"]}}
PREDICTION = {"data": {"sources": [{"path": "/none", "caption": "x", "prior": {"kind": "prediction", "prompt": "a"}}]}}
CASES = {
    "SD3 with a prior and a preview": (SD3, torch.bfloat16, PREDICTION | PREVIEW),
    "SD3.5 medium in fp16, half of it checkpointed, with high ranks and dropout": (
        SD35_MEDIUM,
        torch.float16,
        {
            "method": {"rank": 256, "alpha": 3.0, "targets": "attention+mlp", "dropout": 0.1},
            "train": {"gradient_checkpointing": "selective", "checkpointed_blocks": 11},
            "ema": {"decay": 0.9},
        }
        | PREVIEW,
    ),
    "SD3.5 large, checkpointed and in 4 bits": (
        SD35_LARGE,
        torch.bfloat16,
        {"train": {"gradient_checkpointing": "block"}, "model": {"quantize": "nf4"}} | PREVIEW,
    ),
    "SD3 with half of its blocks swapped": (SD3, torch.bfloat16, {"train": {"swap_blocks": 12}}),
    "the whole of SD3.5 medium, updated in the backward pass": (
        SD35_MEDIUM,
        torch.bfloat16,
        {
            "method": {"kind": "full"},
            "train": {"gradient_checkpointing": "block", "fused_backward": True, "max_grad_norm": None},
        },
    ),
    "the whole of SD3.5 medium": (SD35_MEDIUM, torch.float32, {"method": {"kind": "full"}} | PREVIEW),
}
LONG = [
    "SD3.5 large, checkpointed and in 4 bits",
    "SD3.5 medium in fp16, half of it checkpointed, with high ranks and dropout",
    "the whole of SD3.5 medium",
]
"""Left to `make check-long`."""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def rehearsed(base: str, dtype: torch.dtype, sections: dict) -> Training:
    plain = {"data": {"sources": [{"path": "/none", "caption": "x"}]}, **sections}
    config = parse_config({**plain, "model": {**plain.get("model", {}), "base": base}}).config
    shape = shape_of_base(config.model)
    return rehearse_training(config, shape, METHODS[config.method.kind](config, shape), (512, 512), dtype)


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.long] * (case in LONG)) for case in CASES])
def test_few_blocks_take_what_all_of_them_take(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "4 bits" in case:
        pytest.importorskip("bitsandbytes")
    base, dtype, sections = CASES[case]
    few = asdict(rehearsed(base, dtype, sections))
    monkeypatch.setattr(thinning, "LEAD", 100)  # so nothing is left out
    whole = asdict(rehearsed(base, dtype, sections))
    if "updated in the backward pass" in case:  # groups of parameters begin at other values of a block
        assert few.pop("working") == pytest.approx(whole.pop("working"), rel=0.02)
    assert few == whole


@pytest.mark.parametrize(
    ("method", "left"),
    [
        ({}, [0, 1, 2, 12, 13, 14, 15, 22, 23]),
        ({"rank_pattern": {"attn2.to_q": 4}}, [0, 1, 2, 12, 13, 14, 15, 22, 23]),
        ({"targets": ["attn2.to_q"]}, [0, 1, 2, 12, 13, 14, 15, 22, 23]),
        ({"blocks": ["0-11"]}, range(24)),
        ({"targets": ["transformer_blocks.5.attn.to_q"]}, [0, 1, 2, 4, 5, 6, 7, 8, 12, 13, 14, 15, 22, 23]),
        ({"rank_pattern": {"re:transformer_blocks\\.7\\..*": 4}}, range(24)),
        ({"rank_pattern": {"re:transformer_blocks\\.2\\..*": 4}}, range(24)),
        ({"kind": "full"}, [0, 1, 2, 12, 13, 14, 15, 22, 23]),
    ],
)
def test_blocks_are_left_out_where_the_method_trains_them_equally(method: dict, left: Sequence[int]) -> None:
    sections = {"model": {"base": SD35_MEDIUM}, "method": method}
    config = parse_config({**sections, "data": {"sources": [{"path": "/none", "caption": "x"}]}}).config
    base = shape_of_base(config.model)
    transformer = load_transformer(base, torch.bfloat16, "meta", prepare=hoist)
    thin = thinning.thin_out(transformer, METHODS[config.method.kind](config, base), None)
    assert list(thin.counts) == [int(name) for name in transformer.transformer_blocks._modules] == list(left)
    assert sum(thin.counts.values()) == 24
    assert len(hoisted(transformer)) == 2 * len(thin.counts) + 1


def test_drawing_takes_what_all_blocks_take(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(
        {"model": {"base": SD35_MEDIUM}, "data": {"sources": [{"path": "/none", "caption": "x"}]}}
    ).config
    base = shape_of_base(config.model)
    method = METHODS["lora"](config, base)
    few = rehearse_drawing(config, base, method, (512, 512), torch.bfloat16)
    monkeypatch.setattr(thinning, "LEAD", 100)
    assert rehearse_drawing(config, base, method, (512, 512), torch.bfloat16) == few


def test_remembered_kernels_count_as_those_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    given = "tiny", torch.bfloat16, {"train": {"gradient_checkpointing": "selective"}} | PREVIEW
    rehearsed(*given)
    again = rehearsed(*given)
    monkeypatch.setattr(footprint, "_call_on_meta", lambda *_: None)
    assert rehearsed(*given) == again

"""The shape of a new transformer: what is asked for, else the base's; what its other parts decide cannot be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sd3tune.config.sections.model import ModelConfig, TransformerConfig
from sd3tune.errors import ConfigError, ModelError
from sd3tune.model.base.resolve import configured_base, resolve_base
from sd3tune.model.base.shape import new_shape
from sd3tune.model.load.components import empty_transformer, load_transformer

SMALL: dict[str, Any] = {
    "num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 8, "sample_size": 8, "pos_embed_max_size": 16,
}  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A base that has no transformer at all."""
    folder = Path(shutil.copytree(resolve_base("tiny").path, tmp_path / "bare"))
    shutil.rmtree(folder / "transformer")
    return folder


def shape(base: str | Path, **asked: Any) -> dict[str, Any]:
    return new_shape(resolve_base(str(base)), TransformerConfig(**asked))


def problems(base: str | Path, **asked: Any) -> list[str]:
    with pytest.raises((ConfigError, ModelError)) as caught:
        shape(base, **asked)
    return list(caught.value.problems)


@pytest.mark.parametrize("base", ["tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large"])
def test_nothing_asked_for_is_the_bases_own_shape(base: str) -> None:
    own = json.loads((resolve_base(base).path / "transformer" / "config.json").read_text())
    expected = {key: value for key, value in own.items() if not key.startswith("_")}
    assert new_shape(resolve_base(base), None) == shape(base) == expected


def test_what_is_asked_for_wins_and_the_width_inside_follows() -> None:
    found = shape("tiny", num_layers=7, num_attention_heads=6, qk_norm="none", dual_attention_layers=[])
    assert (found["num_layers"], found["num_attention_heads"], found["attention_head_dim"]) == (7, 6, 16)
    assert found["caption_projection_dim"] == 96
    assert found["qk_norm"] is None
    assert found["dual_attention_layers"] == []


def test_a_second_attention_is_left_out_where_the_base_had_more_blocks() -> None:
    assert shape("tiny", num_layers=1)["dual_attention_layers"] == [0]


def test_a_base_without_a_transformer_gives_the_widths(bare: Path) -> None:
    found = shape(bare, **SMALL)
    widths = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim", "caption_projection_dim")
    assert [found[key] for key in widths] == [16, 16, 64, 48, 24]
    assert (found["patch_size"], found["qk_norm"], found["dual_attention_layers"]) == (2, None, [])
    (line,) = problems(bare, num_layers=2)
    assert line == (
        f"model.transformer: {bare} has no transformer/config.json to take num_attention_heads, attention_head_dim, "
        "sample_size, pos_embed_max_size from; give them here"
    )


def test_without_t5_the_text_is_as_wide_as_asked_or_as_clip(bare: Path) -> None:
    shutil.rmtree(bare / "text_encoder_3")
    assert shape(bare, **SMALL)["joint_attention_dim"] == 48
    assert shape(bare, **SMALL, joint_attention_dim=50)["joint_attention_dim"] == 50
    (line,) = problems(bare, **SMALL, joint_attention_dim=40)
    assert "its CLIP encoders are 48 wide together, more than 40" in line


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"in_channels": 4}, "model.transformer.in_channels: 4 does not fit; it is 16, the channels of the base's VAE"),
        ({"out_channels": 4}, "model.transformer.out_channels: 4 does not fit; it is 16"),
        ({"joint_attention_dim": 4096}, "joint_attention_dim: 4096 does not fit; it is 64, the width of the base's T5"),
        ({"pooled_projection_dim": 2048}, "pooled_projection_dim: 2048 does not fit; it is 48, the projections"),
        ({"caption_projection_dim": 32}, "caption_projection_dim: 32 does not fit; it is 64, heads times their width"),
        ({"num_attention_heads": 1, "attention_head_dim": 6}, "6 is no width that position embeddings have"),
        ({"dual_attention_layers": [4]}, "dual_attention_layers: there is no block 4; the last one is 3"),
    ],
)
def test_what_does_not_fit_is_one_line(asked: dict[str, Any], says: str) -> None:
    (line,) = problems("tiny", **asked)
    assert says in line


def test_all_that_does_not_fit_is_told_at_once() -> None:
    assert len(problems("tiny", in_channels=4, joint_attention_dim=8)) == 2


def test_the_base_has_the_new_shape_and_weights_wherever_it_is_asked(bare: Path) -> None:
    model = ModelConfig(base=str(bare), init="random", transformer=TransformerConfig(**SMALL))
    base, other = configured_base(model, 1), configured_base(model, 2)
    assert empty_transformer(base).config.num_layers == 2
    assert base.config("transformer") == new_shape(base, model.transformer)
    assert sum(p.numel() for p in load_transformer(base, torch.float32).parameters()) == sum(
        p.numel() for p in empty_transformer(base).parameters()
    )
    prints = {base.fingerprint("transformer"), other.fingerprint("transformer")}
    deeper = ModelConfig(base=str(bare), init="random", transformer=TransformerConfig(**{**SMALL, "num_layers": 3}))
    prints.add(configured_base(deeper, 1).fingerprint("transformer"))
    assert len(prints) == 3
    assert configured_base(model, 1).fingerprint("transformer") in prints

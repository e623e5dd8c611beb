"""New weights: a function of seed and name, of the sizes that training wants, and nothing of anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from sd3tune.model.base.base import RandomTransformer
from sd3tune.model.load.random_weights import random_transformer

SHAPE: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 8, "joint_attention_dim": 64, "caption_projection_dim": 128, "pooled_projection_dim": 48,
    "pos_embed_max_size": 16, "dual_attention_layers": [0], "qk_norm": "rms_norm",
}  # fmt: skip
WIDTH = 128


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_transformer(RandomTransformer(SHAPE, 7), torch.float32).state_dict()


def test_the_same_seed_is_the_same_weights_whatever_the_global_state(weights) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = random_transformer(RandomTransformer(SHAPE, 7), torch.float32).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    other = random_transformer(RandomTransformer(SHAPE, 8), torch.float32).state_dict()
    assert not torch.equal(other["context_embedder.weight"], weights["context_embedder.weight"])


def test_a_weight_is_the_same_in_a_deeper_model(weights) -> None:
    deeper = random_transformer(RandomTransformer({**SHAPE, "num_layers": 5}, 7), torch.float32).state_dict()
    name = "transformer_blocks.1.attn.to_q.weight"
    assert torch.equal(deeper[name], weights[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_another_dtype_they_are_the_same_rounded(weights, dtype: torch.dtype) -> None:
    rounded = random_transformer(RandomTransformer(SHAPE, 7), dtype).state_dict()
    assert all(torch.equal(rounded[name], weights[name].to(dtype)) for name in weights)


def test_it_has_the_names_shapes_and_position_embeddings_of_diffusers_own(weights) -> None:
    plain = SD3Transformer2DModel.from_config(SHAPE).state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in plain.items()}
    assert torch.equal(weights["pos_embed.pos_embed"], plain["pos_embed.pos_embed"])


def test_what_modulates_and_what_comes_last_is_zero(weights) -> None:
    zero = {name for name, tensor in weights.items() if not tensor.any()}
    modulating = {
        f"transformer_blocks.{block}.{norm}.linear.{part}"
        for block in range(3)
        for norm in ("norm1", "norm1_context")
        for part in ("weight", "bias")
    }
    biases = {name for name in weights if name.endswith(".bias")}
    last = {f"{layer}.{part}" for layer in ("norm_out.linear", "proj_out") for part in ("weight", "bias")}
    assert zero == modulating | biases | last


def test_weights_have_the_spread_that_keeps_activations_of_one_size(weights) -> None:
    """Xavier: the variance is 2 / (in + out), of the patches' projection too; 0.02 in the MLPs of the conditioning."""
    for name, fans in {
        "transformer_blocks.0.attn.to_q.weight": (WIDTH, WIDTH),
        "transformer_blocks.0.attn2.to_out.0.weight": (WIDTH, WIDTH),
        "transformer_blocks.1.ff.net.0.proj.weight": (WIDTH, 4 * WIDTH),
        "transformer_blocks.1.ff_context.net.2.weight": (4 * WIDTH, WIDTH),
        "context_embedder.weight": (64, WIDTH),
        "pos_embed.proj.weight": (16 * 2 * 2, WIDTH),
    }.items():
        assert weights[name].std().item() == pytest.approx((2 / sum(fans)) ** 0.5, rel=0.03), name
        assert weights[name].abs().max() <= (6 / sum(fans)) ** 0.5
    for name in ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "text_embedder.linear_1"):
        assert weights[f"time_text_embed.{name}.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert all(bool((weights[name] == 1).all()) for name in weights if ".norm_" in name)


def test_it_predicts_nothing_at_first_and_learns_from_the_first_step_on() -> None:
    transformer = random_transformer(RandomTransformer(SHAPE, 7), torch.float32)
    inputs = {
        "hidden_states": torch.randn(2, 16, 8, 8),
        "timestep": torch.tensor([100.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 93, 64),
        "pooled_projections": torch.randn(2, 48),
        "return_dict": False,
    }
    assert not transformer(**inputs)[0].any()
    target = torch.randn(2, 16, 8, 8)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.mse_loss(transformer(**inputs)[0], target).backward()
        optimizer.step()
    still = {name for name, parameter in transformer.named_parameters() if not parameter.grad.any()}
    assert still == {  # what the last block makes of the text's queries is read by nothing
        f"transformer_blocks.2.attn.{name}" for name in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
    }

"""Modulations that are computed ahead, and positions that are cropped ahead, against the model as diffusers has it."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from sd3tune.data.sampler import generator
from sd3tune.model.base.parts import is_modulation
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.compute.checkpointing import checkpoint_blocks
from sd3tune.model.compute.fast import use_fast_path
from sd3tune.model.compute.hoist import compute_ahead, hoist, hoisted, modulate, row_bytes
from sd3tune.model.load.components import load_transformer
from sd3tune.model.lora.layers import Layer, inject_lora
from sd3tune.model.lora.targets import select_modules

BASES = ("tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large")
TIMESTEP = torch.tensor([250.0, 900.0])


def transformers(base: str, dtype: torch.dtype = torch.float32) -> tuple[SD3Transformer2DModel, SD3Transformer2DModel]:
    """The plain one, and the hoisted one."""
    found = resolve_base(base)
    return load_transformer(found, dtype), load_transformer(found, dtype, prepare=hoist)


def pooled_of(transformer: SD3Transformer2DModel, rows: int = 2) -> Tensor:
    return torch.randn(rows, transformer.config.pooled_projection_dim, generator=generator(1)).to(transformer.dtype)


def velocity(transformer: SD3Transformer2DModel, height: int = 12, width: int = 8) -> Tensor:
    source, config, dtype = generator(2), transformer.config, transformer.dtype
    found: Tensor = transformer(
        hidden_states=torch.randn(2, 16, height, width, generator=source).to(dtype),
        timestep=TIMESTEP,
        encoder_hidden_states=torch.randn(2, 21, config.joint_attention_dim, generator=source).to(dtype),
        pooled_projections=pooled_of(transformer),
        return_dict=False,
    )[0]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_modulations_in_a_batchs_own_shape_change_no_bit(base: str, dtype: torch.dtype) -> None:
    plain, lean = transformers(base, dtype)
    expected = velocity(plain)
    assert torch.equal(velocity(lean), expected), "computed in the step"
    other, own = compute_ahead(lean, [(TIMESTEP.flip(0), pooled_of(lean)), (TIMESTEP, pooled_of(lean))])
    modulate(lean, own)
    assert torch.equal(velocity(lean), expected)
    modulate(lean, other)
    assert not torch.equal(velocity(lean), expected), "they are what is used"
    modulate(lean, None)
    assert torch.equal(velocity(lean), expected)


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
@pytest.mark.parametrize("base", BASES)
def test_a_window_of_many_steps_is_off_by_rounding_alone(base: str, checkpointing: str) -> None:
    outputs, gradients = [], []
    for transformer in transformers(base):
        modules = select_modules(transformer, "attention", None)
        parameters = inject_lora(
            transformer, {name: Layer(4, 4.0) for name in modules}, lambda name: generator(0, name)
        )
        for parameter in parameters.values():
            parameter.data.normal_(std=0.05, generator=generator(3))
        checkpoint_blocks(transformer, checkpointing, None)
        use_fast_path(transformer)
        if hoisted(transformer):
            many = pooled_of(transformer).repeat(32, 1)
            (window,) = compute_ahead(transformer, [(TIMESTEP.repeat(32), many)])
            modulate(transformer, [of[62:] for of in window])
        output = velocity(transformer)
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append(torch.cat([parameter.grad.reshape(-1) for parameter in parameters.values()]))
    for expected, found in (outputs, gradients):
        assert (found - expected).norm() / expected.norm() < 2e-6


@pytest.mark.parametrize("base", BASES)
def test_what_is_hoisted_is_all_that_makes_modulations(base: str) -> None:
    plain, lean = transformers(base)
    gone = {name for name, _ in plain.named_parameters()} - {name for name, _ in lean.named_parameters()}
    assert gone == {name for name, _ in plain.named_parameters() if is_modulation(name)}
    blocks, width = len(plain.transformer_blocks), plain.inner_dim
    dual = sum(block.use_dual_attention for block in plain.transformer_blocks)
    assert row_bytes(lean) == 4 * width * (12 * blocks + 3 * dual - 4 + 2)  # the last block's text has 2 of 6
    assert sum(buffer.nbytes for buffer in lean.buffers()) < 1e-3 * sum(buffer.nbytes for buffer in plain.buffers())


@torch.no_grad()
def test_pictures_of_many_sizes_have_their_positions() -> None:
    plain, lean = transformers("tiny")
    for side in (8, 16, 4, 12, 6, 10, 8):  # more than are kept
        assert torch.equal(velocity(lean, side, 8), velocity(plain, side, 8))
    with pytest.raises(ValueError, match="cannot be greater than `pos_embed_max_size`"):
        velocity(lean, 4 * plain.config.pos_embed_max_size, 8)
    assert torch.equal(velocity(lean), velocity(plain)), "and after one that has none"


def test_a_layer_of_modulation_is_told_by_its_name() -> None:
    names = ("transformer_blocks.0.norm1.linear", "norm_out.linear", "transformer_blocks.3.norm1_context.linear.weight")
    assert all(map(is_modulation, names))
    others = ("transformer_blocks.0.attn.to_q", "time_text_embed.timestep_embedder.linear_1", "transformer_blocks.0.ff")
    assert not any(map(is_modulation, others))

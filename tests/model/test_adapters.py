"""Which modules LoRA trains, that all of them and only they can learn, and how they start."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError
from sd3tune.model.adapters import ADAPTER_NAME, CoverageRow, coverage, inject_lora, lora_layers, select_modules
from sd3tune.model.bases import resolve_base
from sd3tune.model.components import empty_transformer, load_transformer

# Name, blocks, blocks with a second attention (`attn2`), and the count that follows by hand: 8 projections a block
# (q, k, v and output of the image's and of the context's stream), less the last block's to_add_out, which does not
# exist, and its add_q_proj, which cannot learn; and 4 more for each second attention.
SHAPES = [("tiny-sd3", 4, 0, 30), ("tiny-sd35-medium", 4, 2, 38), ("tiny-sd35-large", 6, 0, 46)]
each_shape = pytest.mark.parametrize(("name", "blocks", "dual", "count"), SHAPES, ids=lambda value: str(value))
WIDTH = 64  # tiny-sd3's and tiny-sd35-medium's, in both streams


def skeleton(name: str = "tiny") -> SD3Transformer2DModel:
    return empty_transformer(resolve_base(name))


def load(name: str = "tiny", dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    return load_transformer(resolve_base(name), dtype)


def velocity(transformer: SD3Transformer2DModel) -> Tensor:
    source, dtype = generator(5), transformer.dtype
    return transformer(
        hidden_states=torch.randn(1, 16, 8, 8, generator=source).to(dtype),
        timestep=torch.tensor([400.0]),
        encoder_hidden_states=torch.randn(1, 93, 64, generator=source).to(dtype),
        pooled_projections=torch.randn(1, 48, generator=source).to(dtype),
        return_dict=False,
    )[0]


def inject(transformer: SD3Transformer2DModel, modules: Iterable[str], rank: int = 4) -> dict[str, nn.Parameter]:
    return inject_lora(transformer, list(modules), rank, 4.0, lambda name: generator(7, name))


@each_shape
def test_attention_is_both_streams_and_the_second_attention(name: str, blocks: int, dual: int, count: int) -> None:
    modules = select_modules(skeleton(name), "attention")
    expected = set()
    for block in range(blocks):
        last = block == blocks - 1
        kinds = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
        kinds += [] if last else ["add_q_proj", "to_add_out"]
        expected |= {f"transformer_blocks.{block}.attn.{kind}" for kind in kinds}
        if block < dual:
            expected |= {f"transformer_blocks.{block}.attn2.{kind}" for kind in ("to_q", "to_k", "to_v", "to_out.0")}
    assert set(modules) == expected
    assert len(modules) == count


@each_shape
def test_all_that_is_trained_learns_and_what_is_left_out_cannot(name: str, blocks: int, dual: int, count: int) -> None:
    """PEFT on every attention projection, the one left out included: its gradient alone is exactly zero."""
    transformer = load(name)
    left_out = f"transformer_blocks.{blocks - 1}.attn.add_q_proj"
    modules = select_modules(transformer, "attention")
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=[*modules, left_out]))
    parameters = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    for number, parameter in enumerate(parameters.values()):
        parameter.data.normal_(0, 0.2, generator=generator(number))
    velocity(transformer).square().mean().backward()

    gradients = {key: parameter.grad.abs().max().item() for key, parameter in parameters.items()}
    dead = {key for key, largest in gradients.items() if largest == 0}
    assert dead == {f"{left_out}.lora_{letter}.{ADAPTER_NAME}.weight" for letter in "AB"}
    assert len(gradients) == 2 * (count + 1)


def test_a_list_selects_by_ending_or_by_full_name_in_the_models_order() -> None:
    transformer = skeleton()
    blocks = [f"transformer_blocks.{block}" for block in range(4)]
    assert select_modules(transformer, ["attn.to_v", "attn.to_q"]) == [
        f"{block}.attn.{kind}" for block in blocks for kind in ("to_q", "to_v")
    ]
    assert select_modules(transformer, ["attn2.to_q"]) == [f"{block}.attn2.to_q" for block in blocks[:2]]
    assert len(select_modules(transformer, ["to_q"])) == 6
    assert select_modules(transformer, ["transformer_blocks.1.attn.to_q"]) == ["transformer_blocks.1.attn.to_q"]
    assert select_modules(transformer, ["proj_out"]) == ["proj_out"]


def test_a_list_leaves_out_what_cannot_learn() -> None:
    assert select_modules(skeleton(), ["attn.add_q_proj"]) == [
        f"transformer_blocks.{block}.attn.add_q_proj" for block in range(3)
    ]


def test_targets_that_match_nothing_are_all_named() -> None:
    with pytest.raises(AdapterError) as caught:
        select_modules(skeleton("tiny-sd3"), ["attn.to_q", "attn.to_kk", "attn2.to_q", "o_q"])
    assert [problem.split(" matches")[0] for problem in caught.value.problems] == [
        "method.targets: 'attn.to_kk'", "method.targets: 'attn2.to_q'", "method.targets: 'o_q'",
    ]  # fmt: skip
    assert "its modules are" in caught.value.problems[0]
    assert "attn.to_k, " in caught.value.problems[0]


def test_a_target_that_can_never_learn_is_an_error() -> None:
    with pytest.raises(AdapterError, match=r"transformer_blocks\.3\.attn\.add_q_proj, whose output nothing reads"):
        select_modules(skeleton(), ["transformer_blocks.3.attn.add_q_proj"])


def test_the_coverage_table_counts_blocks_and_parameters() -> None:
    transformer, rank = skeleton(), 3
    rows = {row.module: row for row in coverage(transformer, select_modules(transformer, "attention"), rank)}
    pair = rank * (WIDTH + WIDTH)
    assert rows["attn.to_q"] == CoverageRow("attn.to_q", 4, 4, 4 * pair)
    assert rows["attn.add_q_proj"] == CoverageRow("attn.add_q_proj", 3, 4, 3 * pair)
    assert rows["attn.to_add_out"] == CoverageRow("attn.to_add_out", 3, 3, 3 * pair)
    assert rows["attn2.to_out.0"] == CoverageRow("attn2.to_out.0", 2, 2, 2 * pair)
    assert len(rows) == 12
    assert sum(row.trained for row in rows.values()) == 38


def test_the_coverage_table_knows_sides_of_unequal_length_and_modules_outside_the_blocks() -> None:
    transformer = skeleton()
    rows = coverage(transformer, select_modules(transformer, ["ff.net.2", "proj_out"]), 3)
    assert rows == [
        CoverageRow("ff.net.2", 4, 4, 4 * 3 * (4 * WIDTH + WIDTH)),
        CoverageRow("proj_out", 1, 1, 3 * (WIDTH + 2 * 2 * 16)),
    ]


@each_shape
def test_exactly_the_selected_modules_get_layers(name: str, blocks: int, dual: int, count: int) -> None:
    transformer = load(name)
    modules = select_modules(transformer, "attention")
    parameters = inject(transformer, modules)
    assert list(lora_layers(transformer)) == modules
    assert list(parameters) == [f"{module}.lora_{letter}" for module in modules for letter in "AB"]
    trainable = {id(parameter) for parameter in transformer.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in parameters.values()}


def test_the_start_is_pefts_distribution_with_b_zero() -> None:
    """PEFT draws A from U(-b, b) with b = sqrt(6 / ((1 + a^2) fan_in)) and a = sqrt 5, so b = 1 / sqrt(fan_in)."""
    ours, pefts = load("tiny-sd35-large"), load("tiny-sd35-large")
    modules = select_modules(ours, ["attn.to_q", "attn.add_k_proj", "ff.net.2"])
    parameters = inject(ours, modules, rank=16)
    pefts.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=modules))
    for module, layer in lora_layers(pefts).items():
        down, expected = parameters[f"{module}.lora_A"], layer.lora_A[ADAPTER_NAME].weight
        assert down.shape == expected.shape
        bound = 1 / math.sqrt(down.shape[1])
        for drawn in (down, expected):
            assert 0.98 * bound < drawn.abs().max().item() <= bound
            assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not parameters[f"{module}.lora_B"].any()
        assert not layer.lora_B[ADAPTER_NAME].weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_the_output_is_the_bases_bit_for_bit(dtype: torch.dtype) -> None:
    transformer = load(dtype=dtype)
    with torch.no_grad():
        before = velocity(transformer)
        parameters = inject(transformer, select_modules(transformer, "attention"))
        if dtype is torch.bfloat16:
            for parameter in parameters.values():
                parameter.data = parameter.data.to(dtype)  # as the flat master does
        assert torch.equal(velocity(transformer), before)


def test_the_start_is_fp32_and_the_same_for_every_dtype_and_global_random_state() -> None:
    starts = []
    for seed, dtype in ((1, torch.float32), (2, torch.bfloat16), (3, torch.float32)):
        torch.manual_seed(seed)
        transformer = load(dtype=dtype)
        starts.append(inject(transformer, select_modules(transformer, ["attn.to_q"])))
    for start in starts:
        assert {parameter.dtype for parameter in start.values()} == {torch.float32}
        assert all(torch.equal(start[name], starts[0][name]) for name in starts[0])
    assert not torch.equal(*(starts[0][f"transformer_blocks.{block}.attn.to_q.lora_A"] for block in (0, 1)))

"""Which modules the presets, names, expressions and blocks select, and that all of them and only they can learn."""

from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch import nn

from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import empty_transformer, load_transformer
from sd3tune.model.lora.layers import ADAPTER_NAME
from sd3tune.model.lora.targets import CoverageRow, coverage, select_modules, untrainable_modules, values_by_pattern

# Name, blocks, blocks with a second attention (`attn2`), and counts that follow by hand.
# attention: 8 projections a block (q, k, v and output of the image's and of the context's stream), less the last
#   block's to_add_out, which does not exist, and its add_q_proj, which cannot learn; 4 more for each second attention.
#   4 * 8 - 2 = 30;  4 * 8 - 2 + 2 * 4 = 38;  6 * 8 - 2 = 46
# attention-image: 4 a block and 4 for each second attention.  16;  16 + 8 = 24;  24
# attention+mlp: also 2 a block for ff, and 2 for ff_context, which the last block lacks.
#   30 + 8 + 6 = 44;  38 + 8 + 6 = 52;  46 + 12 + 10 = 68
SHAPES = [
    ("tiny-sd3", 4, 0, {"attention": 30, "attention-image": 16, "attention+mlp": 44}),
    ("tiny-sd35-medium", 4, 2, {"attention": 38, "attention-image": 24, "attention+mlp": 52}),
    ("tiny-sd35-large", 6, 0, {"attention": 46, "attention-image": 24, "attention+mlp": 68}),
]
each_shape = pytest.mark.parametrize(("name", "blocks", "dual", "counts"), SHAPES, ids=[shape[0] for shape in SHAPES])
WIDTH = 64  # tiny-sd3's and tiny-sd35-medium's, in both streams; tiny-sd35-large has 96


def skeleton(name: str = "tiny") -> SD3Transformer2DModel:
    return empty_transformer(resolve_base(name))


@each_shape
@pytest.mark.parametrize("preset", ["attention", "attention-image", "attention+mlp"])
def test_a_preset_is_what_it_says(name: str, blocks: int, dual: int, counts: dict[str, int], preset: str) -> None:
    expected = set()
    for block in range(blocks):
        last = block == blocks - 1
        kinds = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
        kinds += ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"] if block < dual else []
        if preset != "attention-image":
            kinds += ["attn.add_k_proj", "attn.add_v_proj"]
            kinds += [] if last else ["attn.add_q_proj", "attn.to_add_out"]
        if preset == "attention+mlp":
            kinds += ["ff.net.0.proj", "ff.net.2"]
            kinds += [] if last else ["ff_context.net.0.proj", "ff_context.net.2"]
        expected |= {f"transformer_blocks.{block}.{kind}" for kind in kinds}
    modules = select_modules(skeleton(name), preset)
    assert set(modules) == expected
    assert len(modules) == counts[preset]


@each_shape
def test_of_all_linear_layers_only_those_left_out_cannot_learn(
    velocity, name: str, blocks: int, dual: int, counts
) -> None:
    """PEFT on every linear layer of the model: exactly one of them has a gradient of zero."""
    transformer = load_transformer(resolve_base(name), torch.float32)
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=linear))
    parameters = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    for number, parameter in enumerate(parameters.values()):
        parameter.data.normal_(0, 0.2, generator=generator(number))
    velocity(transformer).square().mean().backward()

    dead = {key for key, parameter in parameters.items() if parameter.grad.abs().max().item() == 0}
    left_out = f"transformer_blocks.{blocks - 1}.attn.add_q_proj"
    assert untrainable_modules(skeleton(name)) == {left_out}
    assert dead == {f"{left_out}.lora_{letter}.{ADAPTER_NAME}.weight" for letter in "AB"}
    assert len(parameters) == 2 * len(linear)


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


def test_an_expression_matches_whole_names() -> None:
    transformer = skeleton()
    assert select_modules(transformer, r"re:transformer_blocks\.[02]\.attn\.to_[qk]") == [
        f"transformer_blocks.{block}.attn.to_{kind}" for block in (0, 2) for kind in "qk"
    ]
    assert select_modules(transformer, ["proj_out", r"re:.*\.1\..*add_k_proj"]) == [
        "transformer_blocks.1.attn.add_k_proj",
        "proj_out",
    ]
    with pytest.raises(AdapterError, match=r"'re:attn\\\\.to_q' matches no linear module"):
        select_modules(transformer, r"re:attn\.to_q")


def test_an_expression_leaves_out_what_cannot_learn() -> None:
    everything = select_modules(skeleton(), "re:.*")
    linear = [name for name, module in skeleton().named_modules() if isinstance(module, nn.Linear)]
    assert set(linear) - set(everything) == {"transformer_blocks.3.attn.add_q_proj"}


@pytest.mark.parametrize(
    ("blocks", "numbers"), [([1], {1}), (["0-2"], {0, 1, 2}), ([3, "0-1"], {0, 1, 3}), (["2"], {2}), (["3-3"], {3})]
)
def test_blocks_restrict_every_kind_of_target(blocks, numbers: set[int]) -> None:
    transformer = skeleton()
    for targets in ("attention+mlp", ["to_q"], "re:.*"):
        chosen = select_modules(transformer, targets, blocks)
        inside = [name for name in select_modules(transformer, targets) if name.split(".")[0] == "transformer_blocks"]
        assert chosen == [name for name in inside if int(name.split(".")[1]) in numbers]
        assert chosen


def test_a_block_beyond_the_last_names_their_number() -> None:
    for blocks in ([4], ["0-11"], ["0-99999999999999"]):
        with pytest.raises(AdapterError) as caught:
            select_modules(skeleton(), "attention", blocks)
        assert caught.value.problems == (
            f"method.blocks: {str(blocks[0]).rpartition('-')[2]} is out of range; this base has 4 blocks, 0 to 3",
        )


def test_a_target_outside_the_blocks_is_named() -> None:
    with pytest.raises(AdapterError, match=r"'attn2.to_q' matches nothing in method.blocks, only transformer_blocks.0"):
        select_modules(skeleton(), ["attn.to_q", "attn2.to_q"], ["2-3"])


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


@pytest.mark.parametrize(
    ("targets", "blocks"), [(["transformer_blocks.3.attn.add_q_proj"], None), (["attn.add_q_proj"], [3])]
)
def test_a_target_that_can_never_learn_is_an_error(targets: list[str], blocks: list[int] | None) -> None:
    with pytest.raises(AdapterError, match=r"transformer_blocks\.3\.attn\.add_q_proj, whose output nothing reads"):
        select_modules(skeleton(), targets, blocks)


def test_the_first_pattern_that_fits_gives_the_value_and_idle_ones_are_named() -> None:
    modules = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn2.to_q"]
    values = values_by_pattern(modules, {r"re:.*\.1\.attn\..*": 4, "to_q": 8}, 16, "method.rank_pattern")
    assert list(values.items()) == list(zip(modules, (8, 4, 8), strict=True))
    assert set(values_by_pattern(modules, {}, 16, "").values()) == {16}
    with pytest.raises(AdapterError) as caught:
        values_by_pattern(modules, {"to_k": 4, "to_q": 8, "re:attn": 2}, 16, "method.rank_pattern")
    assert caught.value.problems == (
        "method.rank_pattern: 'to_k' matches none of the trained modules",
        "method.rank_pattern: 're:attn' matches none of the trained modules",
    )


@each_shape
@pytest.mark.parametrize("preset", ["attention", "attention-image", "attention+mlp"])
def test_the_coverage_table_counts_blocks_and_parameters(name: str, blocks: int, dual: int, counts, preset) -> None:
    transformer, rank = skeleton(name), 3
    width = 96 if name == "tiny-sd35-large" else WIDTH
    square, mlp = rank * 2 * width, rank * 5 * width  # feed-forward layers are four times as wide inside
    modules = select_modules(transformer, preset)
    rows = {row.module: row for row in coverage(transformer, dict.fromkeys(modules, rank))}
    expected = {}
    for kind in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"):
        expected[kind] = (blocks, blocks, blocks * square)
        if dual:
            expected[kind.replace("attn", "attn2")] = (dual, dual, dual * square)
    if preset != "attention-image":
        expected |= dict.fromkeys(("attn.add_k_proj", "attn.add_v_proj"), (blocks, blocks, blocks * square))
        expected["attn.add_q_proj"] = (blocks - 1, blocks, (blocks - 1) * square)
        expected["attn.to_add_out"] = (blocks - 1, blocks - 1, (blocks - 1) * square)
    if preset == "attention+mlp":
        for kind in ("net.0.proj", "net.2"):
            expected[f"ff.{kind}"] = (blocks, blocks, blocks * mlp)
            expected[f"ff_context.{kind}"] = (blocks - 1, blocks - 1, (blocks - 1) * mlp)
    assert rows == {kind: CoverageRow(kind, *numbers) for kind, numbers in expected.items()}
    assert sum(row.trained for row in rows.values()) == counts[preset]


def test_the_coverage_table_knows_ranks_of_their_own_and_modules_outside_the_blocks() -> None:
    transformer = skeleton()
    ranks = dict.fromkeys(select_modules(transformer, ["ff.net.2"]), 3) | {"proj_out": 2}
    assert coverage(transformer, ranks) == [
        CoverageRow("ff.net.2", 4, 4, 4 * 3 * (4 * WIDTH + WIDTH)),
        CoverageRow("proj_out", 1, 1, 2 * (WIDTH + 2 * 2 * 16), in_blocks=False),
    ]

"""Other tools' layouts: what their loaders look for, and that every layout comes to the same changes of the weights.

The changes are computed here, in float64, from each file alone, as the tool that it is for computes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd3tune.adapter.file import read_adapter, save_tensors
from sd3tune.adapter.rearrange import arrange, interpret
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import empty_transformer
from sd3tune.model.lora.targets import select_modules

BASES = ["tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large"]
QUERY, KEY = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"

# kohya sd-scripts, networks/lora_sd3.py: "lora_unet_" and the dotted name of each Linear of the MMDiT in
# library/sd3_models.py with underscores, then .lora_down.weight, .lora_up.weight and .alpha. ComfyUI, comfy/lora.py
# (model_lora_keys_unet): the same names, or "diffusion_model." and the dotted ones, with .lora_A.weight and
# .lora_B.weight or kohya's endings.
IN_EVERY_BLOCK = (
    "x_block.attn.qkv", "x_block.attn.proj", "x_block.mlp.fc1", "x_block.mlp.fc2", "x_block.adaLN_modulation.1",
    "context_block.attn.qkv", "context_block.adaLN_modulation.1",
)  # fmt: skip
NOT_IN_THE_LAST = ("context_block.attn.proj", "context_block.mlp.fc1", "context_block.mlp.fc2")
WHERE_DUAL = ("x_block.attn2.qkv", "x_block.attn2.proj")
OUTSIDE = (
    "context_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2",
    "final_layer.adaLN_modulation.1", "final_layer.linear",
)  # fmt: skip


def expected_modules(base: str) -> set[str]:
    config = empty_transformer(resolve_base(base)).config
    names = set(OUTSIDE)
    for block in range(config.num_layers):
        inside = [*IN_EVERY_BLOCK]
        inside += NOT_IN_THE_LAST if block < config.num_layers - 1 else ()
        inside += WHERE_DUAL if block in config.dual_attention_layers else ()
        names |= {f"joint_blocks.{block}.{name}" for name in inside}
    return names


def write_source(folder: Path, base: str, targets: str = "re:.*", *, rslora: bool = False) -> Path:
    """A file of diffusers' with ranks and alphas that differ inside one qkv, or rank-stabilised; B is far from zero."""
    transformer = empty_transformer(resolve_base(base))
    ranks = {
        name: {"to_k": 3, "add_v_proj": 5}.get(name.rpartition(".")[2], 4)
        for name in select_modules(transformer, targets)
    }
    tensors = {}
    for name, rank in ranks.items():
        module, source = transformer.get_submodule(name), generator(0, name)
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=source)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=source)
    peft = {"lora_alpha": 6.0, "use_rslora": rslora, "alpha_pattern": {"to_v": 2.5, "ff.net.2": 1.0}}
    file = folder / "source.safetensors"
    described = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in peft.items()})}
    save_file(tensors, file, metadata={**described, "sd3tune": json.dumps({"base": base, "trigger": "sks"})})
    return file


def source_changes(file: Path, *, rslora: bool = False) -> dict[str, Tensor]:
    """Module -> what it adds to the weight, from the file of `write_source`."""
    tensors, changes = load_file(file), {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        down, up = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        alpha = 2.5 if module.endswith("to_v") else 1.0 if module.endswith("ff.net.2") else 6.0
        changes[module] = alpha / (len(down) ** 0.5 if rslora else len(down)) * up @ down
    return changes


def kohya_changes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original module, dots as underscores -> change, as kohya's LoRAModule computes it: alpha over the rows of A."""
    changes = {}
    for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
        module, down = key.removesuffix(".lora_down.weight"), tensors[key].double()
        scale = tensors[f"{module}.alpha"].double() / len(down)
        changes[module.removeprefix("lora_unet_")] = scale * tensors[f"{module}.lora_up.weight"].double() @ down
    return changes


def comfyui_changes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As ComfyUI's LoRAAdapter: without an alpha the product as it is."""
    assert not [key for key in tensors if key.endswith(".alpha")]
    return {
        key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight").replace(".", "_"):
        tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        for key in tensors if key.endswith(".lora_A.weight")
    }  # fmt: skip


CHANGES: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "kohya": kohya_changes,
    "comfyui": comfyui_changes,
}


def in_original_layout(base: str, changes: Mapping[str, Tensor], original_layout) -> dict[str, Tensor]:
    """The changes as a published checkpoint would have them (see `original_layout`), dots as underscores."""
    folder = resolve_base(base).path
    transformer, vae = (
        load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("transformer", "vae")
    )
    zeros = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in transformer.items()}
    laid_out = original_layout({**zeros, **{f"{name}.weight": value for name, value in changes.items()}}, vae)
    return {
        re.sub(r"\.", "_", name.removeprefix("model.diffusion_model.").removesuffix(".weight")): value
        for name, value in laid_out.items()
        if name.startswith("model.diffusion_model.") and name.endswith(".weight") and value.any()
    }


def assert_same_changes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert (found[name] - change).norm() <= 1e-6 * change.norm(), name


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha over rank", "rank-stabilised"])
@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("base", BASES)
def test_every_layout_comes_to_the_same_changes_there_and_back(
    original_layout, base: str, layout: str, rslora: bool, tmp_path: Path
) -> None:
    file = write_source(tmp_path, base, rslora=rslora)
    expected = source_changes(file, rslora=rslora)
    source = read_adapter(file)
    tensors = arrange(source.folded(), layout)
    assert_same_changes(CHANGES[layout](tensors), in_original_layout(base, expected, original_layout))

    save_tensors(tmp_path / "there.safetensors", tensors, {})
    back = read_adapter(tmp_path / "there.safetensors")
    assert {name: len(down) for name, (down, _) in back.factors.items()} == {
        name: len(down) for name, (down, _) in source.factors.items()
    }
    scales = {name: back.alphas[name] / len(down) for name, (down, _) in back.factors.items()}
    changes = {name: scales[name] * up.double() @ down.double() for name, (down, up) in back.factors.items()}
    assert_same_changes(changes, expected)


@pytest.mark.parametrize("base", BASES)
def test_names_and_shapes_are_those_that_the_other_tools_look_for(base: str, tmp_path: Path) -> None:
    factors = read_adapter(write_source(tmp_path, base)).folded()
    modules, width = expected_modules(base), empty_transformer(resolve_base(base)).config.caption_projection_dim
    kohya, comfyui = arrange(factors, "kohya"), arrange(factors, "comfyui")
    endings = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(kohya) == {f"lora_unet_{name.replace('.', '_')}.{ending}" for name in modules for ending in endings}
    assert set(comfyui) == {f"diffusion_model.{name}.lora_{letter}.weight" for name in modules for letter in "AB"}
    qkv = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    assert kohya[f"{qkv}.lora_down.weight"].shape == (3 * 4, width)  # k has rank 3 and is padded to 4
    assert kohya[f"{qkv}.lora_up.weight"].shape == (3 * width, 3 * 4)
    assert kohya[f"{qkv}.alpha"].shape == ()
    assert kohya[f"{qkv}.alpha"] == 12
    up = kohya[f"{qkv}.lora_up.weight"]
    assert not any(up[:width, 4:].any() or block.any() for block in (up[width : 2 * width, :4], up[2 * width :, :8]))
    context = comfyui["diffusion_model.joint_blocks.0.context_block.attn.qkv.lora_A.weight"]
    assert context.shape == (3 * 5, width)


def test_a_lora_of_the_fused_module_becomes_three_that_share_a_and_one_again() -> None:
    source = torch.Generator().manual_seed(0)
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(6, 64, generator=source),
        f"{name}.lora_up.weight": torch.randn(192, 6, generator=source),
        f"{name}.alpha": torch.tensor(3.0),
    }
    contents = interpret(tensors)
    assert contents.layout == "kohya"
    assert list(contents.factors) == [QUERY, KEY, "transformer_blocks.0.attn.to_v"]
    assert set(contents.alphas.values()) == {3.0}
    folded = {module: (down, up * 0.5) for module, (down, up) in contents.factors.items()}
    again = arrange(folded, "kohya")
    assert again[f"{name}.lora_down.weight"].shape == (6, 64)
    assert_same_changes(kohya_changes(again), kohya_changes(tensors))


def test_an_untrained_block_diagonal_file_keeps_its_ranks() -> None:
    tensors = arrange({QUERY: (torch.ones(2, 64), torch.zeros(64, 2))}, "comfyui")
    assert {name: down.shape for name, (down, _) in interpret(tensors).factors.items()} == {QUERY: (2, 64)}


@pytest.mark.parametrize(
    "prefix",
    ["transformer.transformer_blocks.0.attn.to_q", "base_model.model.transformer_blocks.0.attn.to_q",
     "lora_transformer_transformer_blocks_0_attn_to_q", "lycoris_transformer_blocks_0_attn_to_q"],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["lora_{}.weight", "lora_{}.default.weight", "kohya"])
def test_names_that_comfyui_knows_for_diffusers_modules_are_read(prefix: str, ending: str) -> None:
    endings = ["lora_down.weight", "lora_up.weight"] if ending == "kohya" else [ending.format(of) for of in "AB"]
    down, up = torch.ones(2, 64), torch.ones(64, 2)
    tensors = {f"{prefix}.{endings[0]}": down, f"{prefix}.{endings[1]}": up, f"{prefix}.alpha": torch.tensor(1.0)}
    contents = interpret(tensors)
    assert (contents.unknown, contents.broken, contents.alphas) == ({}, {}, {QUERY: 1.0})
    assert [tuple(factor.shape) for factor in contents.factors[QUERY]] == [(2, 64), (64, 2)]


def test_every_flat_name_means_one_module() -> None:
    """`norm1_context_linear` could be cut in several ways; underscores inside names must not mislead."""
    for base in BASES:
        for module in select_modules(empty_transformer(resolve_base(base)), "re:.*"):
            flat = f"lycoris_{module.replace('.', '_')}"
            tensors = {f"{flat}.lora_down.weight": torch.ones(1, 4), f"{flat}.lora_up.weight": torch.ones(4, 1)}
            assert list(interpret(tensors).factors) == [module]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("lora_unet_joint_blocks_0_x_block_attn_of.dora_scale", "DoRA"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_mid.weight", "a kind of adapter"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "another architecture"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "Stable Diffusion 1, 2 or XL"),
        ("diffusion_model.joint_blocks.0.x_block.attn.proj.diff", "no LoRA"),
        ("something.else", "belongs to no module"),
    ],
)
def test_what_does_not_belong_is_refused_with_what_it_is(key: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "made.safetensors"
    pair = arrange({QUERY: (torch.ones(2, 64), torch.ones(64, 2))}, "kohya")
    save_file({**pair, key: torch.ones(2, 64)}, file)
    with pytest.raises(AdapterError, match="not a LoRA of SD3's transformer alone") as caught:
        read_adapter(file)
    (line,) = caught.value.problems
    assert says in line
    assert key in line


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({".lora_up.weight": torch.ones(190, 2)}, "190 rows cannot be cut"),
        ({".alpha": torch.ones(2)}, "alpha is not a finite number"),
        ({".lora_up.weight": torch.ones(192, 2, dtype=torch.int8)}, "int8 is no type"),
        ({".lora_up.weight": torch.ones(0, 2)}, "empty"),
        ({".lora_up.weight": torch.ones(192, 3)}, "not a pair of matrices"),
        ({".lora_down.weight": torch.ones(2, 4, 2, 2)}, "not a pair of matrices"),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_module(tensors: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    name, file = "lora_unet_joint_blocks_0_x_block_attn_qkv", tmp_path / "made.safetensors"
    good = {".lora_down.weight": torch.ones(2, 64), ".lora_up.weight": torch.ones(192, 2), ".alpha": torch.ones(())}
    save_file({f"{name}{ending}": tensor for ending, tensor in {**good, **tensors}.items()}, file)
    with pytest.raises(AdapterError, match=says) as caught:
        read_adapter(file)
    assert caught.value.problems[0].startswith(f"{file}: joint_blocks.0.x_block.attn.qkv: ")


def test_a_module_in_two_layouts_is_refused(tmp_path: Path) -> None:
    factors = {QUERY: (torch.ones(2, 64), torch.ones(64, 2))}
    save_file({**arrange(factors, "kohya"), **arrange(factors, "comfyui")}, tmp_path / "made.safetensors")
    with pytest.raises(AdapterError, match="is in the file twice"):
        read_adapter(tmp_path / "made.safetensors")


def test_what_the_original_layout_has_no_place_for_is_refused() -> None:
    pair = (torch.ones(2, 64), torch.ones(64, 2))
    for module in ("transformer_blocks.0.attn.to_x", "proj_in", "transformer_blocks.0.proj_out"):
        with pytest.raises(AdapterError, match=f"{module}: the original layout has no such"):
            arrange({module: pair}, "kohya")
    with pytest.raises(AdapterError, match="of different sizes"):
        arrange({QUERY: pair, KEY: (torch.ones(2, 32), torch.ones(64, 2))}, "comfyui")


PIECES = st.sampled_from(
    ["lora_unet_", "transformer.", "diffusion_model.", "joint_blocks_0_", "joint_blocks.0.", "x_block", ".attn.qkv",
     "_attn_qkv", ".lora_A.weight", ".lora_up.weight", ".lora_down.weight", ".alpha", "transformer_blocks.0.attn.to_q",
     "norm_out.linear", "é\n", "x"]
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@given(st.dictionaries(st.lists(PIECES, min_size=1, max_size=5).map("".join), SHAPES, max_size=6))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_keys_and_shapes_the_answer_is_an_adapter_or_one_line(
    tmp_path: Path, shapes: dict[str, list[int]]
) -> None:
    file = tmp_path / "made.safetensors"
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, file)
    try:
        adapter = read_adapter(file)
    except AdapterError as error:
        (line,) = error.problems
        assert "\n" not in line
    else:
        assert all(len(down) == up.shape[1] > 0 for down, up in adapter.factors.values())

"""Other tools' rules at the sizes of the released models, by diffusers' own conversion of checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd3tune.adapter.attach import attach
from sd3tune.adapter.file import read_adapter, write_adapter
from sd3tune.adapter.layouts import PATCH_EMBEDDER
from sd3tune.adapter.rearrange import arrange, interpret
from sd3tune.commands.lora_merge import merge_into_base
from sd3tune.commands.lora_verify import verify_lora
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError
from sd3tune.methods.start_from import check_start
from sd3tune.model.base.parts import CONFIGS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.base.weights import read_json
from sd3tune.model.load.components import empty_transformer, load_transformer

RELEASED = ["sd3-medium", "sd35-medium", "sd35-large"]
FUSED, MLP, PATCH = "joint_blocks.0.x_block.attn.qkv", "joint_blocks.1.x_block.mlp.fc1", "x_embedder.proj"
ADAPTED = (
    FUSED, "joint_blocks.0.context_block.attn.qkv", "joint_blocks.0.context_block.adaLN_modulation.1", MLP,
    "joint_blocks.1.context_block.attn.qkv", "joint_blocks.1.context_block.adaLN_modulation.1",
    "final_layer.adaLN_modulation.1", "final_layer.linear", "t_embedder.mlp.0", "y_embedder.mlp.2", "context_embedder",
    PATCH, "joint_blocks.0.x_block.attn2.qkv",
)  # fmt: skip
"""The last block's modulation of the text and the final one are those whose halves are exchanged."""
QUERY = "transformer_blocks.0.attn.to_q"


def probe(down: Tensor) -> Tensor:
    """Three inputs of a layer: what a change makes of them is compared, instead of matrices as large as the weights."""
    features = down.flatten(1).shape[1]
    return torch.randn(features, 3, generator=generator(2, str(features))) / features**0.5


def comfyui_changes(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Original module -> `up @ down * alpha / rank` on the probe, without an alpha the product."""
    changes = {}
    for module in ADAPTED:
        name, endings = keys_of(module, layout)
        if f"{name}.{endings[0]}" in tensors:
            down, up = (tensors[f"{name}.{ending}"].flatten(1) for ending in endings)
            alpha = tensors.get(f"{name}.alpha", torch.tensor(len(down)))
            changes[module] = up @ (down @ probe(down)) * (alpha / len(down))
    return changes


def keys_of(module: str, layout: str) -> tuple[str, tuple[str, str]]:
    """The module's name in a file, and the endings of down and up."""
    if layout == "kohya":
        return f"lora_unet_{module.replace('.', '_')}", ("lora_down.weight", "lora_up.weight")
    return f"diffusion_model.{module}", ("lora_A.weight", "lora_B.weight")


def in_diffusers_names(changes: Mapping[str, Tensor], variant: str, original_layout) -> dict[str, Tensor]:
    """What diffusers' loader of single files makes of a checkpoint of two blocks that is zero but for the changes.

    It cuts and exchanges rows, so that a weight may have the probe's three columns.
    """
    config = read_json(CONFIGS / variant / "transformer" / "config.json")
    dual = tuple(config.get("dual_attention_layers") or ())[:1]
    with torch.device("meta"):
        model = SD3Transformer2DModel.from_config({**config, "num_layers": 2, "dual_attention_layers": dual})
    vae = load_file(resolve_base("tiny").path / "vae" / "diffusion_pytorch_model.safetensors")
    checkpoint = {
        name.removeprefix("model.diffusion_model."): torch.zeros(len(value), 3)
        for name, value in original_layout(model.state_dict(), vae).items()
        if name.startswith("model.diffusion_model.")
    }
    for module, change in changes.items():
        assert checkpoint[f"{module}.weight"].shape == change.shape, module
        checkpoint[f"{module}.weight"] = change
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    return {name.removesuffix(".weight"): value for name, value in converted.items() if value.any()}


def write_foreign(variant: str, layout: str) -> dict[str, Tensor]:
    """A file that kohya's tools or ComfyUI trained or extracted at that base's sizes, rank 3 and alpha 2."""
    config = read_json(CONFIGS / variant / "transformer" / "config.json")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    columns = {"t_embedder.mlp.0": 256, "context_embedder": 4096}
    rows = {"joint_blocks.1.context_block.adaLN_modulation.1": 2, "final_layer.adaLN_modulation.1": 2, MLP: 4,
            "joint_blocks.0.context_block.adaLN_modulation.1": 6}  # fmt: skip
    has_dual = bool(config.get("dual_attention_layers"))
    tensors = {}
    for module in ADAPTED if has_dual else [module for module in ADAPTED if "attn2" not in module]:
        source, outputs = generator(1, module), rows.get(module, 3 if module.endswith("qkv") else 1) * width
        down = torch.randn(3, columns.get(module, width), generator=source)
        up = torch.randn(64 if module == "final_layer.linear" else outputs, 3, generator=source)
        if module == PATCH:
            down, up = torch.randn(3, 16, 2, 2, generator=source), up[:, :, None, None]
        name, endings = keys_of(module, layout)
        tensors |= {f"{name}.{endings[0]}": down, f"{name}.{endings[1]}": up}
        if layout == "kohya":
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


@pytest.mark.parametrize("variant", RELEASED)
@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_comfyuis_rule_is_diffusers_change_at_the_released_sizes(
    original_layout, layout: str, variant: str, tmp_path: Path
) -> None:
    foreign = write_foreign(variant, layout)
    expected = comfyui_changes(foreign, layout)
    save_file(foreign, tmp_path / "foreign.safetensors")
    factors = read_adapter(tmp_path / "foreign.safetensors").folded()
    in_diffusers = in_diffusers_names(expected, variant, original_layout)
    assert factors.keys() == in_diffusers.keys()
    for module, (down, up) in factors.items():
        torch.testing.assert_close(up @ (down @ probe(down)), in_diffusers[module], rtol=1e-4, atol=1e-4)
    again = comfyui_changes(arrange(factors, layout), layout)
    assert again.keys() == expected.keys()
    for module, change in expected.items():
        torch.testing.assert_close(again[module], change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("alpha", "scale"), [(4.0, 1 / 3), (12.0, 1.0)])
def test_a_block_diagonal_file_is_scaled_by_alpha_over_all_its_rows(alpha: float, scale: float) -> None:
    """As sd-scripts writes with `split_qkv`: 3 r rows, and alpha as it was given, often r.

    ComfyUI and sd-scripts itself, when it loads the file, divide by the 3 r rows, and so an alpha of r is a third.
    """
    rank, width, name = 4, 64, "lora_unet_" + FUSED.replace(".", "_")
    downs, ups = torch.randn(3, rank, width), torch.randn(3, width, rank)
    tensors = {f"{name}.lora_down.weight": torch.cat(list(downs)), f"{name}.lora_up.weight": torch.block_diag(*ups)}
    contents = interpret({**tensors, f"{name}.alpha": torch.tensor(alpha)})
    for number, letter in enumerate("qkv"):
        module = f"transformer_blocks.0.attn.to_{letter}"
        down, up = contents.factors[module]
        assert (len(down), contents.alphas[module] / len(down)) == (rank, pytest.approx(scale))
        assert torch.equal(down, downs[number])
        assert torch.equal(up, ups[number])
    fused = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] * alpha / (3 * rank)
    ours = torch.cat([up @ down * scale for down, up in contents.factors.values()])
    torch.testing.assert_close(ours, fused)


# The patch embedder, a convolution


def patch_factors() -> dict[str, Tensor]:
    """Folded factors for `tiny`: the patch embedder and one linear layer."""
    source = generator(3)
    return {
        f"{PATCH_EMBEDDER}.lora_A": torch.randn(2, 16, 2, 2, generator=source) / 8,
        f"{PATCH_EMBEDDER}.lora_B": torch.randn(64, 2, 1, 1, generator=source) / 4,
        f"{QUERY}.lora_A": torch.randn(2, 64, generator=source) / 8,
        f"{QUERY}.lora_B": torch.randn(64, 2, generator=source) / 8,
    }


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "patched", patch_factors(), {"base": "tiny", "base_kind": "tiny"})


def expected_model() -> SD3Transformer2DModel:
    """`tiny` with the changes in its weights, the convolution's summed over the rank."""
    transformer, factors = load_transformer(resolve_base("tiny"), torch.float32), patch_factors()
    down, up = factors[f"{PATCH_EMBEDDER}.lora_A"], factors[f"{PATCH_EMBEDDER}.lora_B"]
    transformer.pos_embed.proj.weight.data += torch.einsum("rchw,or->ochw", down, up[:, :, 0, 0])
    query = transformer.get_submodule(QUERY)
    query.weight.data += factors[f"{QUERY}.lora_B"] @ factors[f"{QUERY}.lora_A"]
    return transformer


@pytest.mark.parametrize("form", ["as it is", "diffusers", "kohya", "comfyui"])
def test_the_patch_embedder_is_applied_in_every_layout(velocity, patched: Path, form: str, tmp_path: Path) -> None:
    file = patched
    if form != "as it is":
        tensors = arrange(read_adapter(patched).folded(), form)
        (down,) = (value for key, value in tensors.items() if value.ndim == 4 and re.search("lora_(A|down)", key))
        assert down.shape == (2, 16, 2, 2)
        file = tmp_path / "converted.safetensors"
        save_file(tensors, file)
    found, before = (load_transformer(resolve_base("tiny"), torch.float32) for _ in range(2))
    assert attach(found, read_adapter(file), "default").matched == 4
    expected = velocity(expected_model())
    assert (velocity(before) - expected).abs().max() > 0.05
    torch.testing.assert_close(velocity(found), expected, rtol=0, atol=2e-5)


def test_the_patch_embedder_is_folded_into_a_base_and_verified_in_diffusers(
    velocity, patched: Path, tmp_path: Path
) -> None:
    merge_into_base([str(patched)], tmp_path / "base", None)
    merged = load_transformer(resolve_base(str(tmp_path / "base")), torch.float32)
    torch.testing.assert_close(velocity(merged), velocity(expected_model()), rtol=0, atol=2e-5)
    assert (
        "4 tensors of 2 modules loaded by diffusers into tiny, none left over" in verify_lora(patched, None, "auto")[0]
    )


def test_the_patch_embedder_cannot_start_a_run(patched: Path) -> None:
    with pytest.raises(
        AdapterError, match=f"also adapts {PATCH_EMBEDDER}, which sd3tune does not train; merge it into its"
    ):
        check_start(read_adapter(patched), empty_transformer(resolve_base("tiny")), {})


@pytest.mark.parametrize(
    ("down", "up", "says"),
    [
        ((2, 16, 3, 3), (64, 2, 1, 1), "not a pair of matrices"),
        ((2, 16, 2, 2), (64, 2, 3, 3), "not a pair of matrices"),
        ((2, 63), (64, 2), "63 columns are no patches of 2x2"),
    ],
)
def test_another_kernel_is_refused(down: tuple[int, ...], up: tuple[int, ...], says: str) -> None:
    for name in (f"transformer.{PATCH_EMBEDDER}", "diffusion_model.x_embedder.proj"):
        broken = interpret({f"{name}.lora_A.weight": torch.ones(down), f"{name}.lora_B.weight": torch.ones(up)}).broken
        assert says in next(iter(broken.values()))


def test_a_larger_patch_embedder_is_of_another_base(patched: Path) -> None:
    with pytest.raises(AdapterError, match=f"{PATCH_EMBEDDER} is 64x64 in the adapter and 96x64 in the model"):
        attach(load_transformer(resolve_base("tiny-sd35-large"), torch.float32), read_adapter(patched), "default")

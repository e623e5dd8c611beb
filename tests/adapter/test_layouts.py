"""What other tools call modules: every unambiguous name is read, and what is for the text encoders is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd3tune.adapter.file import read_adapter
from sd3tune.adapter.layouts import text_encoder_of
from sd3tune.adapter.rearrange import arrange, interpret
from sd3tune.errors import AdapterError

QUERY, LAST = "transformer_blocks.0.attn.to_q", "norm_out.linear"
DOWN, UP = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), torch.arange(128.0).view(64, 2)
SWAPPED = torch.cat(UP.chunk(2)[::-1])


def named(down: str, up: str) -> dict[str, Tensor]:
    return {down: DOWN, up: UP}


@pytest.mark.parametrize(
    "ending",
    [
        "lora_{}.weight", "lora_{}.default.weight", "lora_{}.default_0.weight", "lora_{}.my-Style 1.weight",
        "lora.{}.weight", "lora_linear_layer.{}.weight",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("prefix", "layout"),
    [
        ("", "diffusers"), ("transformer.", "diffusers"), ("base_model.model.", "PEFT"),
        ("transformer.base_model.model.", "PEFT"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("letters", ["AB", ("down", "up")])
@pytest.mark.parametrize("module", [QUERY, LAST])
def test_diffusers_modules_by_every_name(
    module: str, letters: tuple[str, str], prefix: str, layout: str, ending: str
) -> None:
    tensors = named(*(f"{prefix}{module}.{ending.format(letter)}" for letter in letters))
    contents = interpret(tensors)
    assert (contents.unknown, contents.broken, contents.layout) == ({}, {}, layout)
    down, up = contents.factors[module]
    assert torch.equal(down, DOWN)
    assert torch.equal(up, UP)


@pytest.mark.parametrize(
    ("name", "module", "up"),
    [
        # ORIGINAL is without a prefix; earlier versions wrote `transformer.`, and q, k and v apart.
        ("joint_blocks.3.x_block.mlp.fc1", "transformer_blocks.3.ff.net.0.proj", UP),
        ("final_layer.adaLN_modulation.1", LAST, SWAPPED),
        ("transformer.joint_blocks.0.x_block.attn.qkv.0", QUERY, UP),
        ("transformer.joint_blocks.0.x_block.attn2.qkv.1", "transformer_blocks.0.attn2.to_k", UP),
        ("transformer.joint_blocks.0.context_block.attn.qkv.2", "transformer_blocks.0.attn.add_v_proj", UP),
        ("transformer.final_layer.adaLN_modulation.1", LAST, SWAPPED),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.0", QUERY, UP),
        ("transformer.y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1", UP),
    ],
)
def test_the_original_names_of_onetrainer(name: str, module: str, up: Tensor) -> None:
    tensors = {**named(f"{name}.lora_down.weight", f"{name}.lora_up.weight"), f"{name}.alpha": torch.tensor(1.0)}
    contents = interpret(tensors)
    assert (contents.unknown, contents.broken, contents.alphas) == ({}, {}, {module: 1.0})
    assert torch.equal(contents.factors[module][1], up)


def test_onetrainers_fused_modules_without_a_prefix_are_cut_in_three() -> None:
    name = "joint_blocks.0.context_block.attn.qkv"
    up = torch.randn(192, 2)
    contents = interpret({f"{name}.lora_A.weight": DOWN, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.ones(())})
    assert contents.layout == "OneTrainer"
    pieces = [contents.factors[f"transformer_blocks.0.attn.add_{letter}_proj"] for letter in "qkv"]
    assert torch.equal(torch.cat([piece[1] for piece in pieces]), up)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.float8_e4m3fn])
def test_an_alpha_of_any_number_type_is_a_number(dtype: torch.dtype) -> None:
    name = "lora_transformer_transformer_blocks_0_attn_to_q"
    tensors = named(f"{name}.lora_down.weight", f"{name}.lora_up.weight")
    contents = interpret({**tensors, f"{name}.alpha": torch.tensor(4).to(dtype)})
    assert (contents.broken, contents.alphas) == ({}, {QUERY: 4.0})


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(True),
        torch.tensor(1j),
        torch.ones(2, dtype=torch.int64),
        *map(torch.tensor, (torch.nan, torch.inf)),
    ],
)
def test_an_alpha_that_is_no_number_is_refused(alpha: Tensor) -> None:
    tensors = named(f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight")
    assert interpret({**tensors, f"{QUERY}.alpha": alpha}).broken == {QUERY: "its alpha is not a finite number"}


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    tensors = {key: value.clone() for name in ("one", "two") for key, value in named(
        f"transformer.{QUERY}.lora_A.{name}.weight", f"transformer.{QUERY}.lora_B.{name}.weight").items()}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=f"{QUERY}: is in the file twice: it holds several adapters"):
        read_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "key", ["blocks.0.attn.to_q.lora_A.weight", "attn.to_q.lora_A.weight", "to_q.lora.down.weight", "lora_A.weight",
            f"unet.{QUERY}.lora_A.weight", f"{QUERY}.lora_C.weight", f"{QUERY}.lora_A.a.b.weight"]
)  # fmt: skip
def test_names_that_are_of_no_module_of_sd3_stay_unknown(key: str) -> None:
    assert interpret({key: DOWN}).unknown == {key: ""}


TEXT = {
    "CLIP-L": ["lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
               "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight", "clip_l.text_projection.alpha",
               "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"],
    "CLIP-G": ["lora_te2_text_model_encoder_layers_0_mlp_fc1.dora_scale", "text_encoder_2.x.lora_A.default_0.weight",
               "clip_g.x.lora_up.weight", "text_encoders.clip_g.transformer.x.alpha"],
    "T5": ["lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha", "text_encoder_3.x.lora.down.weight",
           "t5.x.alpha", "text_encoders.t5xxl.transformer.x.lora_A.weight"],
    "OneTrainer's embeddings": ["bundle_emb.sks.clip_l", "bundle_emb.<my dog>.t5_out"],
    "a text encoder": ["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"],
}  # fmt: skip


@pytest.mark.parametrize(("encoder", "key"), [(encoder, key) for encoder, keys in TEXT.items() for key in keys])
def test_what_is_for_the_text_encoders_is_known_and_left_out_when_asked(encoder: str, key: str, tmp_path: Path) -> None:
    assert text_encoder_of(key) == encoder
    file = tmp_path / "x.safetensors"
    save_file({**arrange({QUERY: (DOWN, UP)}, "kohya"), key: torch.full((2, 2), torch.nan)}, file)
    with pytest.raises(AdapterError) as caught:
        read_adapter(file)
    (line,) = caught.value.problems
    assert line.startswith(f"{file}: also has 1 tensor for the text encoders ({encoder} 1; first: {key}), which")
    assert "leave them out with --transformer-only (infer and the lora commands)" in line
    assert f"`sd3tune lora convert {file} --transformer-only --to diffusers --out NEW.safetensors`" in line
    adapter = read_adapter(file, transformer_only=True)
    assert adapter.notes == (f"left out: 1 tensor for the text encoders ({encoder} 1; first: {key})",)
    assert not adapter.for_diffusers
    assert list(adapter.factors) == [QUERY]


def test_with_nothing_for_the_transformer_there_is_no_way_out(tmp_path: Path) -> None:
    save_file({key: torch.ones(1) for key in TEXT["CLIP-L"]}, tmp_path / "x.safetensors")
    for transformer_only in (False, True):
        with pytest.raises(AdapterError, match=r"has nothing for the transformer, only 4 tensors for the text"):
            read_adapter(tmp_path / "x.safetensors", transformer_only=transformer_only)


def test_the_choice_lets_nothing_else_through(tmp_path: Path) -> None:
    pair = arrange({QUERY: (DOWN, UP)}, "kohya")
    for number, key in enumerate(["lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "something.else"]):
        file = tmp_path / f"{number}.safetensors"
        save_file({**pair, TEXT["T5"][0]: torch.ones(1), key: torch.ones(1)}, file)
        with pytest.raises(AdapterError, match=key):
            read_adapter(file, transformer_only=True)

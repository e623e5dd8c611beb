"""What a single file holds is known from its header: which model, which config, and why it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sd3tune.errors import ModelError
from sd3tune.model.base.parts import COMMON, CONFIGS, ENCODERS, VARIANTS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.base.single_file_header import misfits, read_checkpoint, read_encoder

Tensors = dict[str, torch.Tensor]
ENCODER_FOLDERS = dict(zip(ENCODERS, ("text_encoder", "text_encoder_2", "text_encoder_3"), strict=True))
# Billions of parameters of the published encoders.
ENCODER_PARAMETERS = {"clip_l": 0.1237, "clip_g": 0.6947, "t5": 4.762}


def load_config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def parameters(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e9


@pytest.fixture(scope="module")
def hollow_encoder(write_hollow) -> Callable[[str, Path], Path]:
    """`hollow_encoder("t5", file)`: the names and shapes of that encoder as it is published."""

    def write(encoder: str, file: Path) -> Path:
        config = load_config(COMMON / ENCODER_FOLDERS[encoder])
        with torch.device("meta"):
            model = (
                T5EncoderModel(T5Config.from_dict(config))
                if encoder == "t5"
                else CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))
            )
        assert parameters(model) == pytest.approx(ENCODER_PARAMETERS[encoder], rel=2e-3)
        return write_hollow(file, model.state_dict())

    return write


# The released models


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_released_model_is_known_by_its_shapes(write_released, variant: str, tmp_path: Path) -> None:
    file = write_released(variant, tmp_path / "model.safetensors")
    found = read_checkpoint(file)
    assert found.variant == variant
    assert found.parts.keys() == {"transformer", "vae"}
    assert found.parts["transformer"].config == load_config(CONFIGS / variant / "transformer")
    assert found.parts["vae"].config == load_config(COMMON / "vae")


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_shapes_of_a_released_encoder_give_its_config(hollow_encoder, encoder: str, tmp_path: Path) -> None:
    file = hollow_encoder(encoder, tmp_path / "encoder.safetensors")
    assert read_encoder(file, encoder).config == load_config(COMMON / ENCODER_FOLDERS[encoder])


def test_a_base_of_another_size_gets_its_config_from_the_shapes(single_file) -> None:
    found, folder = read_checkpoint(single_file("tiny")), resolve_base("tiny")
    assert found.variant is None
    expected = {key: value for key, value in folder.config("transformer").items() if not key.startswith("_")}
    config = dict(found.parts["transformer"].config)
    assert config.pop("sample_size") == 128  # how large an image is drawn when nothing is said; no weight depends on it
    expected.pop("sample_size")
    config.pop("_class_name")
    assert config == expected
    for key in ("block_out_channels", "layers_per_block", "norm_num_groups", "scaling_factor", "shift_factor"):
        assert found.parts["vae"].config[key] == folder.config("vae")[key]


def test_text_encoders_inside_a_checkpoint_are_found(single_file, tmp_path: Path) -> None:
    file = single_file("tiny")
    tensors = load_file(file)
    for encoder, inside in (("clip_g", "clip_g"), ("t5", "t5xxl")):
        encoder_tensors = load_file(file.with_name(f"{encoder}.safetensors"))
        tensors |= {f"text_encoders.{inside}.transformer.{name}": value for name, value in encoder_tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path / "model.safetensors").parts.keys() == {"transformer", "vae", "clip_g", "t5"}


def test_the_ending_of_a_file_may_be_in_any_case(single_file, tmp_path: Path) -> None:
    file = tmp_path / "MODEL.SAFETENSORS"
    file.symlink_to(single_file("tiny"))
    assert read_checkpoint(file).parts.keys() == read_checkpoint(single_file("tiny")).parts.keys()
    with pytest.raises(ModelError, match=r"SafeTensors: no such file$"):
        resolve_base("sub/gone.SafeTensors")


# What is refused

OTHERS = {
    "a Stable Diffusion XL model": ["conditioner.embedders.1.model.ln_final.weight", "first_stage_model.decoder.x"],
    "a Flux model": ["double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight"],
    "a Stable Diffusion 1 or 2 model": ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x"],
    "a LoRA": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "a LoRA ": ["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"],
    "one part of a model in diffusers' layout": ["transformer_blocks.0.attn.to_q.weight"],
    "a CLIP text encoder": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "a T5 text encoder": ["encoder.block.0.layer.0.SelfAttention.q.weight"],
    "a VAE": ["decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"],
    "something unknown (1 tensors, first weight)": ["weight"],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_architecture_is_named(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(2, 2) for name in OTHERS[kind]}, file)
    with pytest.raises(ModelError) as caught:
        resolve_base(str(file))
    (line,) = caught.value.problems
    assert line.startswith(f"{file}: {kind.strip()}")
    assert line.endswith(", not a Stable Diffusion 3 or 3.5 checkpoint")


@pytest.mark.parametrize("name", ["sd3.ckpt", "sd3.pt", "sd3.bin", "sd3.pth"])
def test_pickled_checkpoints_are_refused(name: str, tmp_path: Path) -> None:
    for exists in (False, True):
        with pytest.raises(ModelError, match=rf"{name}: pickled weights are refused, .* get the \.safetensors file"):
            resolve_base(str(tmp_path / name))
        with pytest.raises(ModelError, match=rf"{name}: pickled weights are refused"):
            read_encoder(tmp_path / name, "t5")
        if not exists:
            torch.save({}, tmp_path / name)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"sd3\.5_medium\.safetensors: no such file$"):
        resolve_base(str(tmp_path / "sd3.5_medium.safetensors"))


def spoilt(single_file, tmp_path: Path, edit: Callable[[Tensors], object]) -> Path:
    tensors = load_file(single_file("tiny"))
    edit(tensors)
    save_file(tensors, tmp_path / "spoilt.safetensors")
    return tmp_path / "spoilt.safetensors"


MMDIT = "model.diffusion_model."


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.pop(f"{MMDIT}joint_blocks.2.x_block.mlp.fc1.bias"),
            r"incomplete: it lacks model\.diffusion_model\.joint_blocks\.2\.x_block\.mlp\.fc1\.bias; get the file",
        ),
        (lambda tensors: tensors.pop(f"{MMDIT}pos_embed"), r"incomplete: it lacks model\.diffusion_model\.pos_embed"),
        (
            lambda tensors: tensors.update({f"{MMDIT}controlnet.weight": torch.zeros(1)}),
            r"not a plain Stable Diffusion 3 checkpoint: controlnet\.weight is no tensor",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("first_stage_model.")],
            r"a Stable Diffusion 3 transformer without a VAE .* get the whole checkpoint",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_one_line(single_file, tmp_path: Path, edit, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        resolve_base(str(spoilt(single_file, tmp_path, edit)))
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_is_one_line(single_file, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(single_file("tiny").read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or not a safetensors file"):
        resolve_base(str(file))


# Encoders


def test_a_file_that_is_no_such_encoder_is_refused(single_file) -> None:
    file = single_file("tiny")
    clip, t5 = file.with_name("clip_l.safetensors"), file.with_name("t5.safetensors")
    for given, encoder, message in (
        (t5, "clip_l", r"t5\.safetensors: a T5 text encoder, and model\.text_encoders\.clip_l expects CLIP-L"),
        (clip, "t5", r"clip_l\.safetensors: a CLIP text encoder, and model\.text_encoders\.t5 expects T5"),
        (file, "t5", r"model\.safetensors: a Stable Diffusion 3 transformer, and model\.text_encoders\.t5 expects T5"),
    ):
        with pytest.raises(ModelError, match=message):
            read_encoder(given, encoder)


def test_released_encoders_in_each_others_place_are_refused_by_their_width(hollow_encoder, tmp_path: Path) -> None:
    files = {encoder: hollow_encoder(encoder, tmp_path / f"{encoder}.safetensors") for encoder in ("clip_l", "clip_g")}
    transformer = load_config(CONFIGS / "sd35-medium" / "transformer")
    assert misfits({encoder: read_encoder(file, encoder) for encoder, file in files.items()}, transformer) == []
    wrong = {"clip_l": read_encoder(files["clip_g"], "clip_l"), "clip_g": read_encoder(files["clip_l"], "clip_g")}
    assert misfits(wrong, transformer) == [
        f"{files['clip_g']}: its width is 1280 (CLIP-G's), and model.text_encoders.clip_l expects CLIP-L of width 768",
        f"{files['clip_l']}: its width is 768 (CLIP-L's), and model.text_encoders.clip_g expects CLIP-G of width 1280",
    ]


def test_encoders_of_other_sizes_are_compared_with_the_transformer(single_file) -> None:
    file = single_file("tiny")
    clip_l, clip_g, t5 = (file.with_name(f"{encoder}.safetensors") for encoder in ENCODERS)
    transformer = resolve_base("tiny").config("transformer")

    def lines(l_file: Path, g_file: Path, joint: int = 64) -> list[str]:
        parts = {"clip_l": read_encoder(l_file, "clip_l"), "clip_g": read_encoder(g_file, "clip_g")}
        parts["t5"] = read_encoder(t5, "t5")
        return misfits(parts, {**transformer, "joint_attention_dim": joint})

    assert lines(clip_l, clip_g) == []
    (line,) = lines(clip_g, clip_g)
    assert "pooled vectors of 32 and 32, and this base expects 48 together" in line
    (line,) = lines(clip_g, clip_l)
    assert "swap clip_l and clip_g" in line
    assert lines(clip_l, clip_g, joint=4096) == [
        f"{t5}: its width is 64, and model.text_encoders.t5 expects T5 of width 4096"
    ]


def test_clip_g_without_its_projection_is_incomplete(single_file, tmp_path: Path) -> None:
    tensors = load_file(single_file("tiny").with_name("clip_g.safetensors"))
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "clip_g.safetensors")
    with pytest.raises(ModelError, match=r"clip_g\.safetensors: incomplete: it lacks text_projection\.weight"):
        read_encoder(tmp_path / "clip_g.safetensors", "clip_g")


# Files that describe what no file of their size can hold


def test_a_block_of_a_great_number_is_a_missing_block_before_it(tmp_path: Path) -> None:
    names = ["joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.99999999.x_block.attn.qkv.weight"]
    tensors = {name: torch.zeros(1) for name in [*names, "first_stage_model.decoder.conv_in.weight"]}
    tensors["x_embedder.proj.weight"] = torch.zeros(1, 1, 1, 1)
    save_file(tensors, tmp_path / "small.safetensors")
    with pytest.raises(ModelError, match=r"incomplete: it lacks context_embedder\.bias"):
        read_checkpoint(tmp_path / "small.safetensors")


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_layer_of_a_great_number_is_not_built(encoder: str, tmp_path: Path) -> None:
    inside = "encoder.block" if encoder == "t5" else "text_model.encoder.layers"
    tensors = {f"{inside}.{number}.x": torch.zeros(1) for number in (0, "9" * 5000)}
    save_file(tensors, tmp_path / "small.safetensors")
    with pytest.raises(ModelError, match="incomplete: it lacks"):
        read_encoder(tmp_path / "small.safetensors", encoder)


def test_sizes_without_any_bytes_are_limited(single_file, tmp_path: Path) -> None:
    tensors = load_file(single_file("tiny"))
    tensors["model.diffusion_model.context_embedder.weight"] = torch.zeros(10**12, 0)
    save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(ModelError, match=r"wide\.safetensors: the shapes of its tensors: \w+: "):
        resolve_base(str(tmp_path / "wide.safetensors")).config("transformer")


@pytest.mark.parametrize("shape", [[], [0], [0, 0, 0, 0], [4, 16, 0, 0]])
def test_shapes_that_say_nothing_are_one_line(shape: list[int], single_file, tmp_path: Path) -> None:
    tensors = load_file(single_file("tiny"))
    tensors["model.diffusion_model.x_embedder.proj.weight"] = torch.zeros(shape)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match=r"odd\.safetensors: ") as caught:
        resolve_base(str(tmp_path / "odd.safetensors")).config("transformer")
    assert "\n" not in str(caught.value)

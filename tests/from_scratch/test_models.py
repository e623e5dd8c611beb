"""Each model written from scratch computes what transformers and diffusers do, and so do its gradients."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from examples.sd3_from_scratch import flow
from examples.sd3_from_scratch.checkpoint import MMDIT, load, load_single_file, renamed
from examples.sd3_from_scratch.generate import conditions, shift_of
from examples.sd3_from_scratch.mmdit import Projections, grid_of_positions
from sd3tune.model.base.resolve import resolve_base

BASES = ("nano", "tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large")


@pytest.fixture(params=BASES)
def folder(request: pytest.FixtureRequest) -> Path:
    return resolve_base(request.param).path


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def inputs(config) -> dict[str, Tensor]:
    """Of a picture that is not square, at two noise levels."""
    return {
        "hidden_states": torch.randn(2, config.in_channels, 8, 12),
        "timestep": 1000 * torch.rand(2),
        "encoder_hidden_states": torch.randn(2, 77 + 20, config.joint_attention_dim),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim),
    }


def velocity(model, given: dict[str, Tensor]) -> Tensor:
    latents, timestep, text, pooled = given.values()
    return model(latents, timestep / 1000, text, pooled)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_clips_text_encoders(folder: Path, part: str) -> None:
    theirs = CLIPTextModelWithProjection.from_pretrained(folder / part, dtype=torch.float32)
    ids = torch.randint(3, theirs.config.vocab_size - 3, (3, 77))
    ids[:, 40:] = theirs.config.eos_token_id
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
        states, pooled = load(folder, part)(ids)
    assert error(states, expected.hidden_states[-2]) < 1e-5
    assert error(pooled, expected.text_embeds) < 1e-5


def test_the_end_token_of_released_configs_is_not_what_they_say(tmp_path: Path) -> None:
    folder = resolve_base("tiny").path
    theirs = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    theirs.config.eos_token_id = 2
    theirs.save_pretrained(tmp_path / "text_encoder")
    theirs = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder")
    ids = torch.randint(3, theirs.config.vocab_size - 3, (3, 77))
    ids[:, 30:] = theirs.config.vocab_size - 1
    with torch.no_grad():
        assert error(load(tmp_path, "text_encoder")(ids)[1], theirs(ids).text_embeds) < 1e-5


def test_t5(folder: Path) -> None:
    theirs = T5EncoderModel.from_pretrained(folder / "text_encoder_3", dtype=torch.float32)
    ids = torch.randint(0, theirs.config.vocab_size, (2, 300))  # distances far and near
    with torch.no_grad():
        assert error(load(folder, "text_encoder_3")(ids), theirs(ids)[0]) < 1e-5


def test_the_autoencoder_both_ways(folder: Path) -> None:
    theirs, ours = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32), load(folder, "vae")
    pixels, latents = torch.rand(1, 3, 64, 80) * 2 - 1, torch.randn(1, 16, 8, 10)
    with torch.no_grad():
        expected, (mean, deviation) = theirs.encode(pixels).latent_dist, ours.distribution(pixels)
        assert error(mean, expected.mean) < 1e-5
        assert error(deviation, expected.std) < 1e-5
        unscaled = latents / theirs.config.scaling_factor + theirs.config.shift_factor
        assert error(ours.decode(latents), theirs.decode(unscaled)[0]) < 1e-5


def test_the_transformer_and_the_gradients_of_the_loss(folder: Path) -> None:
    theirs, ours = SD3Transformer2DModel.from_pretrained(folder / "transformer"), load(folder, "transformer")
    theirs, ours = theirs.float().requires_grad_(True), ours.requires_grad_(True)
    given, target = inputs(theirs.config), torch.randn(2, theirs.config.out_channels, 8, 12)
    expected, found = theirs(**given, return_dict=False)[0], velocity(ours, given)
    assert error(found, expected) < 1e-5
    for output in (expected, found):
        (output - target).square().mean().backward()
    gradients = renamed(
        {name: parameter.grad for name, parameter in theirs.named_parameters()}, MMDIT, theirs.inner_dim
    )
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, parameter in ours.named_parameters():  # some gradients are 0 but for rounding
        assert (parameter.grad - gradients[name]).norm() < 1e-4 * max(gradients[name].norm(), 1e-4 * largest), name


def test_the_grid_of_positions_follows_from_its_formula() -> None:
    for name in BASES[1:]:  # nano stores it in fp16
        theirs = SD3Transformer2DModel.from_pretrained(resolve_base(name).path / "transformer")
        side, base = theirs.config.pos_embed_max_size, theirs.config.sample_size // theirs.config.patch_size
        ours = grid_of_positions(theirs.inner_dim, side, base)
        assert (ours.flatten(0, 1) - theirs.pos_embed.pos_embed[0]).abs().max() < 1e-6


def test_one_matrix_for_queries_keys_and_values_is_the_same_function() -> None:
    joint, x = Projections(24, heads=3, normed=True), torch.randn(2, 5, 24)
    weights, biases = joint.qkv.weight.chunk(3), joint.qkv.bias.chunk(3)
    alone = [
        torch.nn.functional.linear(x, w, b).unflatten(-1, (3, 8)).transpose(1, 2)
        for w, b in zip(weights, biases, strict=True)
    ]
    expected = joint.norm_q(alone[0]), joint.norm_k(alone[1]), alone[2]
    for one, other in zip(joint(x), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", ["nano", "tiny-sd3"])
def test_a_whole_picture(base: str) -> None:
    folder = resolve_base(base).path
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompt, negative = "a red circle on a blue background", "it's blurry! <|endoftext|>"
    noise = torch.randn(1, 16, 8, 8)
    expected = pipeline(
        prompt, negative_prompt=negative, num_inference_steps=8, guidance_scale=4.0, latents=noise.clone(), height=64,
        width=64, output_type="pt", max_sequence_length=32,
    ).images  # fmt: skip
    tokens, pooled = conditions(folder, [prompt, negative], 32)
    predict = flow.guided(load(folder, "transformer"), (tokens[:1], pooled[:1]), (tokens[1:], pooled[1:]), 4.0)
    latents = flow.draw(predict, noise, flow.drawing_sigmas(8, shift_of(folder)))
    with torch.no_grad():
        pixels = load(folder, "vae").decode(latents) / 2 + 0.5
    assert (pixels.clamp(0, 1) - expected).abs().max() < 1e-3


def test_the_layout_of_a_single_file(original_layout: Callable, tmp_path: Path) -> None:
    shape = {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "joint_attention_dim": 48,
        "pooled_projection_dim": 40, "caption_projection_dim": 128, "sample_size": 128, "pos_embed_max_size": 12,
        "qk_norm": "rms_norm", "dual_attention_layers": (0,), "in_channels": 16, "out_channels": 16,
    }  # fmt: skip
    transformer = SD3Transformer2DModel(**shape)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), latent_channels=16, layers_per_block=2, use_quant_conv=False,
        use_post_quant_conv=False, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    file = tmp_path / "model.safetensors"
    save_file(original_layout(transformer.state_dict(), vae.state_dict()), file)
    ours, our_vae = load_single_file(file)
    given, pixels = inputs(transformer.config), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert error(velocity(ours, given), transformer(**given, return_dict=False)[0]) < 1e-5
        mean, _ = our_vae.distribution(pixels)
        assert error(mean, vae.encode(pixels).latent_dist.mean) < 1e-5
        assert error(our_vae.decoder(mean), vae.decode(mean)[0]) < 1e-5


def test_a_model_in_several_files(tmp_path: Path) -> None:
    transformer = SD3Transformer2DModel.from_pretrained(resolve_base("tiny").path / "transformer")
    transformer.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    given = inputs(transformer.config)
    with torch.no_grad():
        expected = transformer.float()(**given, return_dict=False)[0]
        assert error(velocity(load(tmp_path, "transformer"), given), expected) < 1e-5


def test_a_missing_matrix_is_no_random_one(tmp_path: Path) -> None:
    shutil.copytree(resolve_base("tiny").path / "transformer", tmp_path / "transformer")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["transformer_blocks.0.attn.to_q.weight"]
    save_file(state, file)
    with pytest.raises(RuntimeError, match="qkv"):
        load(tmp_path, "transformer")

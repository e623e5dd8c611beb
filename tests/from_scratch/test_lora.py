"""A LoRA made from scratch is one for diffusers, and sd3tune's trainer learns the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file

from examples.sd3_from_scratch import flow
from examples.sd3_from_scratch.checkpoint import load
from examples.sd3_from_scratch.lora import NAMES, Lora, add_lora, merge_lora, save_lora
from sd3tune.commands.train import run_training
from sd3tune.model.base.resolve import resolve_base
from tests.training.conftest import assembled

BASE = resolve_base("tiny").path
_ = assembled  # a fixture


@pytest.fixture
def given() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = SD3Transformer2DModel.load_config(BASE / "transformer")
    return {
        "hidden_states": torch.randn(2, config["in_channels"], 8, 8),
        "timestep": 1000 * torch.rand(2),
        "encoder_hidden_states": torch.randn(2, 77 + 16, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(2, config["pooled_projection_dim"]),
    }


def velocity(model, given: dict[str, torch.Tensor]) -> torch.Tensor:
    latents, timestep, text, pooled = given.values()
    with torch.no_grad():
        return model(latents, timestep / 1000, text, pooled)


def test_its_file_loads_in_diffusers_with_every_key_and_computes_the_same(given, tmp_path: Path) -> None:
    ours, file = load(BASE, "transformer"), tmp_path / "pytorch_lora_weights.safetensors"
    plain = velocity(ours, given)
    parameters = add_lora(ours, rank=4)
    assert torch.equal(velocity(ours, given), plain)  # B is 0
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3)
    expected = velocity(ours, given)
    assert (expected - plain).norm() > 0.01 * plain.norm()
    save_lora(ours, file)
    pipeline = StableDiffusion3Pipeline.from_pretrained(BASE, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    loaded = {name for name, _ in pipeline.transformer.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(load_file(file)) == len(parameters)
    with torch.no_grad():
        found = pipeline.transformer(**given, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    merged = load(BASE, "transformer")
    merge_lora(merged, file)
    torch.testing.assert_close(velocity(merged, given), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_sd3tune_is_merged_with_its_scale(given, quick_config, tmp_path: Path) -> None:
    run_training(quick_config(tmp_path / "run", "method={rank: 4, alpha: 2.0}", "train.steps=2"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(BASE, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "run" / "adapter")
    with torch.no_grad():
        expected = pipeline.transformer(**given, return_dict=False)[0]
    merged = load(BASE, "transformer")
    plain = velocity(merged, given)
    merge_lora(merged, tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(velocity(merged, given), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_sd3tunes_trainer_has_the_same_loss_for_a_hundred_steps(quick_config, assembled, tmp_path: Path) -> None:
    training = assembled(quick_config(tmp_path / "run", "train.steps=100", "method={rank: 4, alpha: 4.0}"))
    config, method = training.config, training.method
    model = load(BASE, "transformer")
    parameters = add_lora(model, rank=4)
    _begin_alike(model, training.parameters)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        parameters, settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    for step in range(100):
        batch = training.batches.fetch(step, 0)
        text, pooled = method.conditioning(batch.embeddings, training.transformer)
        predicted = model(flow.line(batch.latents, batch.noise, batch.sigma), batch.sigma, text, pooled)
        loss = flow.velocity_loss(predicted, batch.latents, batch.noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        result = training.step()
        optimizer.param_groups[0]["lr"] = result.learning_rate
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(result.losses.mean().item(), rel=1e-4), step
    assert result.grad_norm > 0


def _begin_alike(model, theirs: dict[str, torch.nn.Parameter]) -> None:
    """Copy the first values of sd3tune's LoRA. It has none where a gradient is 0: the last block's queries of text."""
    values = {name.split(".lora_")[0]: value for name, value in theirs.items() if ".lora_A" in name}
    for path, module in model.named_modules():
        if isinstance(module, Lora):
            block, ours = path.split(".")[1], path.split(".", 2)[2]
            for name, a in zip(NAMES[ours], module.a, strict=True):
                a.data.copy_(values.get(f"transformer_blocks.{block}.{name}", a))

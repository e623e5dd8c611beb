"""Every adapter in training against PEFT's own model with the same tensors: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import Tensor

from sd3tune.data.sampler import generator
from sd3tune.methods import METHODS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.compute.fast import use_fast_path
from sd3tune.model.compute.fast.lora import adapted
from sd3tune.model.load.components import load_transformer
from sd3tune.model.lora.layers import adapter_layers, parameters_of
from sd3tune.training.flat_master import FlatMaster

RANK, ALPHA = 2, 3.0
CONFIGS: dict[str, Callable[[list[str]], Any]] = {
    "lora": lambda modules: LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules),
    "dora": lambda modules: LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, use_dora=True),
    "loha": lambda modules: LoHaConfig(r=RANK, alpha=ALPHA, target_modules=modules),
    "lokr": lambda modules: LoKrConfig(r=RANK, alpha=ALPHA, target_modules=modules, decompose_factor=4),
}
SETTINGS = {"lokr": ", factor: 4"}
Velocity = Callable[[SD3Transformer2DModel], Tensor]


def fresh() -> SD3Transformer2DModel:
    return load_transformer(resolve_base("tiny"), torch.float32)


def peft_key(name: str) -> str:
    return f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_computes_what_peft_computes(velocity: Velocity, quick_config, tmp_path: Path, kind: str) -> None:
    """On the fast path, which leaves every layer but plain LoRA to PEFT."""
    config = quick_config(tmp_path, f"method={{kind: {kind}, rank: {RANK}, alpha: {ALPHA}{SETTINGS.get(kind, '')}}}")
    ours, theirs = fresh(), fresh()
    parameters = METHODS[kind](config, resolve_base("tiny")).inject(ours, lambda name: generator(0, name))
    for name, parameter in parameters.items():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator(1, name))
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    inject_adapter_in_model(CONFIGS[kind](modules), theirs, "default")
    stored = {peft_key(name): parameter.detach().clone() for name, parameter in parameters.items()}
    assert not set_peft_model_state_dict(theirs, stored, "default").unexpected_keys

    master = FlatMaster(parameters, torch.float32)
    use_fast_path(ours)
    fast = {name: adapted(layer) is not None for name, layer in adapter_layers(ours).items()}
    assert set(fast.values()) == {kind == "lora"}
    target = torch.randn(1, 16, 8, 8, generator=generator(9))
    outputs = []
    for transformer in (ours, theirs):
        outputs.append(velocity(transformer))
        (outputs[-1] - target).square().mean().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=2e-6)
    master.collect_gradients()
    found = master.named(master.gradient)
    for name, layer in adapter_layers(theirs).items():
        for part, parameter in parameters_of(layer).items():
            gradient = parameter.grad
            assert gradient is not None
            error = (found[f"{name}.{part}"] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error < 1e-4, f"{name}.{part}"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_the_fast_path_falls_back_layer_by_layer(velocity: Velocity) -> None:
    """A DoRA among plain LoRA: its layer is PEFT's, others are fused, and the output is as without the fast path."""
    transformer = fresh()
    modules = [f"transformer_blocks.{place}.attn.to_{letter}" for place in (0, 1) for letter in "qkv"]
    for of, dora in ((modules[:1], True), (modules[1:], False)):
        config = LoraConfig(r=2, target_modules=of, use_dora=dora, init_lora_weights=False)
        inject_adapter_in_model(config, transformer, "default")
    transformer.requires_grad_(False)
    known = {name: adapted(layer) is not None for name, layer in adapter_layers(transformer).items()}
    assert known == {name: name != modules[0] for name in modules}
    before = velocity(transformer)
    use_fast_path(transformer)
    torch.testing.assert_close(velocity(transformer), before, rtol=0, atol=2e-6)
    assert not torch.allclose(before, velocity(fresh()), atol=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_step_draws_from_global_state(velocity: Velocity, quick_config, tmp_path: Path, kind: str) -> None:
    """PEFT's LoHa and LoKr draw in training mode, even where nothing is ever left out."""
    config = quick_config(tmp_path, f"method={{kind: {kind}, rank: {RANK}}}")
    transformer = fresh()
    METHODS[kind](config, resolve_base("tiny")).inject(transformer, lambda name: generator(0, name))
    state = torch.get_rng_state()
    velocity(transformer)
    assert torch.equal(torch.get_rng_state(), state)

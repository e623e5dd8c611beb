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
from torch.nn import functional as F

from sd3tune.data.sampler import generator
from sd3tune.forecast.footprint import Footprint
from sd3tune.methods import METHODS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.compute.fast import use_fast_path
from sd3tune.model.compute.fast.lora import adapted, linear
from sd3tune.model.load.components import load_transformer
from sd3tune.model.lora.dropout import SeededDropout
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
    """On the fast path, which leaves DoRA to PEFT and multiplies less for LoHa and LoKr."""
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
    assert set(fast.values()) == {kind in ("lora", "loha")}
    target = torch.randn(1, 16, 8, 8, generator=generator(9))
    outputs, counted = [], []
    for transformer in (ours, theirs):
        with Footprint() as footprint:
            outputs.append(velocity(transformer))
            (outputs[-1] - target).square().mean().backward()
        counted.append(footprint.flops)
    assert kind in ("lora", "dora") or counted[0] < counted[1]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=2e-6)
    master.collect_gradients()
    found = master.named(master.gradient)
    for name, layer in adapter_layers(theirs).items():
        for part, parameter in parameters_of(layer).items():
            gradient = parameter.grad
            assert gradient is not None
            error = (found[f"{name}.{part}"] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error < 1e-4, f"{name}.{part}"


def close_to(reference: Tensor, found: Tensor) -> float:
    return ((found.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(
    "settings",
    ["kind: loha, rank: 2", "kind: lokr, rank: 2, factor: 4", "kind: lokr, rank: 1, factor: 8, decompose_both: true",
     "kind: lokr, rank: 16, factor: 4"],
)  # fmt: skip
@pytest.mark.parametrize("targets", ["attention", "attention+mlp"])
def test_layers_on_the_fast_path_are_exact_and_round_as_pefts(
    quick_config, tmp_path: Path, settings: str, targets: str
) -> None:
    """One layer in float64: the change times the inputs. In bf16: no farther from it than PEFT, with some slack."""
    config = quick_config(tmp_path, f"method={{{settings}, alpha: 3.0, targets: {targets}}}")
    transformer = fresh()
    METHODS[config.method.kind](config, resolve_base("tiny")).inject(transformer, lambda name: generator(0, name))
    name = "transformer_blocks.1.attn.to_q" if targets == "attention" else "transformer_blocks.1.ff.net.2"
    layer: Any = transformer.get_submodule(name)
    for part in parameters_of(layer).values():
        part.data = torch.randn(part.shape, generator=generator(2))
    inputs = torch.randn(2, 5, layer.in_features, generator=generator(3))
    towards = torch.randn(2, 5, layer.out_features, generator=generator(4))

    def computed(compute: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        layer.to(dtype).zero_grad()
        given = inputs.to(dtype).requires_grad_()
        result = compute(given)
        result.backward(towards.to(dtype))
        return [result.detach(), given.grad, *(part.grad.clone() for part in parameters_of(layer).values())]  # type: ignore[list-item]

    def fast(given: Tensor) -> Tensor:
        return linear(layer, given)

    exact = computed(lambda given: layer.base_layer(given) + F.linear(given, layer.get_delta_weight("default")),
                     torch.float64)  # fmt: skip
    assert max(map(close_to, exact, computed(fast, torch.float64))) < 1e-14
    ours, pefts = (computed(compute, torch.bfloat16) for compute in (fast, layer))
    errors = list(zip(map(close_to, exact, ours), map(close_to, exact, pefts), strict=True))
    assert all(own < 2 * their + 2e-3 for own, their in errors), errors


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_dropout_acts_on_the_inputs_of_the_update(velocity: Velocity, quick_config, tmp_path: Path, kind: str) -> None:
    config = quick_config(tmp_path, f"method={{kind: {kind}, rank: {RANK}, dropout: 0.5}}")
    method, transformer = METHODS[kind](config, resolve_base("tiny")), fresh()
    for parameter in method.inject(transformer, lambda name: generator(0, name)).values():
        parameter.data = torch.randn(parameter.shape, generator=generator(1)) / 4
    name = "transformer_blocks.0.attn.to_q"
    layer: Any = transformer.get_submodule(name)
    inputs = torch.randn(3, layer.in_features, generator=generator(2))
    plain, mask = layer(inputs), SeededDropout(0.5, name)
    mask.draw(7)
    expected = layer.base_layer(inputs) + F.linear(mask(inputs), layer.get_delta_weight("default"))
    with method.regularised(transformer, 7):
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)
        dropped = velocity(transformer)
        use_fast_path(transformer)
        torch.testing.assert_close(velocity(transformer), dropped, rtol=0, atol=2e-5)
        with method.disabled(transformer):
            assert torch.equal(velocity(transformer), velocity(fresh()))
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert torch.equal(layer(inputs), plain)
    assert not torch.allclose(velocity(transformer), dropped, atol=1e-3)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_own_initialisation_changes_nothing_and_is_as_in_lycoris(
    velocity: Velocity, quick_config, tmp_path: Path, kind: str
) -> None:
    config = quick_config(tmp_path, f"method={{kind: {kind}, rank: {RANK}, init: lycoris}}")
    transformer = fresh()
    parameters = METHODS[kind](config, resolve_base("tiny")).inject(transformer, lambda name: generator(0, name))
    assert torch.equal(velocity(transformer), velocity(fresh()))
    drawn: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        drawn.setdefault(name.rpartition(".")[2], []).append(parameter.detach().flatten())
    spreads = {part: torch.cat(values).std().item() for part, values in drawn.items()}
    expected = {
        "loha": {"hada_w1_a": 0.1, "hada_w1_b": 1, "hada_w2_a": 0, "hada_w2_b": 1},
        "lokr": {"lokr_w1": (3 * 8) ** -0.5, "lokr_w2_a": (3 * RANK) ** -0.5, "lokr_w2_b": 0},  # uniform, of 8 inputs
    }[kind]
    assert spreads == pytest.approx(expected, rel=0.05)


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

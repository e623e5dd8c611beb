"""The layers that modules get: their ranks, scales and start, against PEFT's own."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from sd3tune.data.sampler import generator
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_transformer
from sd3tune.model.lora.layers import ADAPTER_NAME, INITS, Layer, inject_lora, lora_layers
from sd3tune.model.lora.targets import select_modules

BASES = ["tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large"]


def load(name: str = "tiny", dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    return load_transformer(resolve_base(name), dtype)


def inject(
    transformer: SD3Transformer2DModel, modules: Iterable[str], rank: int = 4, **options
) -> dict[str, nn.Parameter]:
    return inject_lora(
        transformer, dict.fromkeys(modules, Layer(rank, 4.0)), lambda name: generator(7, name), **options
    )


@pytest.mark.parametrize("name", BASES)
def test_exactly_the_selected_modules_get_layers(name: str) -> None:
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
def test_at_the_start_the_output_is_the_bases_bit_for_bit(velocity, dtype: torch.dtype) -> None:
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


def start_of(
    name: str, rank: int = 16, seeds: int = 40, features: int = 48, outputs: int = 32
) -> tuple[Tensor, Tensor]:
    """Many starts at once: A's and B's of different generators, stacked."""
    drawn = [INITS[name](rank, features, outputs, generator(seed)) for seed in range(seeds)]
    return torch.stack([a for a, _ in drawn]), torch.stack([b for _, b in drawn])


def pefts_start(name: str, rank: int = 16, seeds: int = 40, features: int = 48, outputs: int = 32):
    from peft import get_peft_model

    config = LoraConfig(r=rank, target_modules=["0"], init_lora_weights=name)
    drawn = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        (layer,) = lora_layers(get_peft_model(nn.Sequential(nn.Linear(features, outputs)), config)).values()
        drawn.append((layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()))
    return torch.stack([a for a, _ in drawn]), torch.stack([b for _, b in drawn])


@pytest.mark.parametrize("name", ["gaussian", "orthogonal"])
def test_other_starts_have_pefts_distribution(name: str) -> None:
    for ours, theirs in zip(start_of(name), pefts_start(name), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype is torch.float32
        assert ours.mean().item() == pytest.approx(0, abs=0.003)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03, abs=1e-9)
        # The distribution over singular values: what a factor does to whatever it is given.
        ours, theirs = (torch.linalg.svdvals(factors).mean(0) for factors in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=1e-5)


def test_gaussian_has_standard_deviation_one_over_the_rank() -> None:
    for rank in (4, 32):
        down, up = start_of("gaussian", rank)
        assert down.std().item() == pytest.approx(1 / rank, rel=0.03)
        assert not up.any()


@pytest.mark.parametrize("rank", [2, 16])
def test_orthogonal_starts_both_factors_with_a_product_of_zero(rank: int) -> None:
    down, up = start_of("orthogonal", rank)
    assert down.abs().mean() > 0.01
    assert up.abs().mean() > 0.01
    for a, b in zip(down, up, strict=True):
        # A's columns and B's rows: each spans half of R^rank, and the halves are orthogonal.
        assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == rank // 2
        assert (b.double() @ a.double()).abs().max() < 1e-7 * b.norm() * a.norm()


@pytest.mark.parametrize("name", [True, "gaussian", "orthogonal", "eva"])
def test_every_start_leaves_the_output_as_it_is(velocity, name: bool | str) -> None:
    transformer = load()
    with torch.no_grad():
        before = velocity(transformer)
        parameters = inject(transformer, select_modules(transformer, "attention+mlp"), init=name)
        torch.testing.assert_close(velocity(transformer), before, rtol=0, atol=1e-5)
        if name != "orthogonal":
            assert torch.equal(velocity(transformer), before)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}


def test_ranks_and_alphas_of_single_modules_are_pefts_scaling() -> None:
    """The scale, by hand: alpha / r, or alpha / sqrt r."""
    transformer = load()
    names = select_modules(transformer, ["attn.to_q", "proj_out"])
    layers = dict(zip(names, [Layer(4, 6.0), Layer(4, 6.0), Layer(2, 6.0), Layer(4, 1.0), Layer(8, 2.0)], strict=True))
    parameters = inject_lora(transformer, layers, lambda name: generator(7, name))
    made = lora_layers(transformer)
    assert [made[name].scaling[ADAPTER_NAME] for name in names] == [1.5, 1.5, 3.0, 0.25, 0.25]
    assert [layers[name].scale for name in names] == [1.5, 1.5, 3.0, 0.25, 0.25]
    assert [len(parameters[f"{name}.lora_A"]) for name in names] == [4, 4, 2, 4, 8]

    stabilised = {name: Layer(layer.rank, layer.alpha, rslora=True) for name, layer in layers.items()}
    transformer = load()
    inject_lora(transformer, stabilised, lambda name: generator(7, name))
    made = lora_layers(transformer)
    expected = [6 / 2, 6 / 2, 6 / 2**0.5, 1 / 2, 2 / 8**0.5]
    assert [made[name].scaling[ADAPTER_NAME] for name in names] == pytest.approx(expected, rel=1e-15)
    assert [stabilised[name].scale for name in names] == pytest.approx(expected, rel=1e-15)

"""The LoRA method: what it trains, how captions become conditioning, and what its file computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sd3tune.adapter import file as adapter_io
from sd3tune.adapter.attach import attach
from sd3tune.data.sampler import generator
from sd3tune.errors import UserError
from sd3tune.methods import METHODS, LoraMethod
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_transformer
from sd3tune.model.lora.layers import ADAPTER_NAME, lora_layers
from sd3tune.training.flat_master import FlatMaster

CONTRACT = {"base": "tiny", "max_sequence_length": 16}


@pytest.fixture
def make(quick_config, tmp_path):
    """`make("key=value", ...)`: the method of that configuration."""
    return lambda *overrides: LoraMethod(quick_config(tmp_path / "run", *overrides))


@pytest.fixture
def transformer() -> SD3Transformer2DModel:
    return load_transformer(resolve_base("tiny"), torch.float32)


def inject(method: LoraMethod, transformer: SD3Transformer2DModel, dtype=torch.float32) -> FlatMaster:
    """Inject with non-zero B's, so that the adapter does something."""
    parameters = method.inject(transformer, lambda name: generator(0, "init", name))
    for name, parameter in parameters.items():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.2, generator=generator(1, name))
    return FlatMaster(parameters, dtype)


def test_it_is_the_method_of_its_kind(quick_config, tmp_path) -> None:
    assert isinstance(METHODS["lora"](quick_config(tmp_path / "run"), resolve_base("tiny")), LoraMethod)


def test_only_the_adapter_is_trained(make, transformer) -> None:
    parameters = make().inject(transformer, lambda name: generator(0, name))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in parameters.values()}


def test_the_start_changes_nothing_and_depends_on_the_seed_alone(velocity, make, transformer) -> None:
    before = velocity(transformer)
    torch.manual_seed(1)
    first = make().inject(transformer, lambda name: generator(3, name))
    assert torch.equal(velocity(transformer), before)
    torch.manual_seed(2)
    other = load_transformer(resolve_base("tiny"), torch.bfloat16)
    second = make().inject(other, lambda name: generator(3, name))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def embeddings(dtype=torch.float32) -> dict[str, dict[str, Tensor]]:
    return {
        "clip_l": {"hidden": torch.full((2, 77, 16), 1.0), "pooled": torch.full((2, 16), 1.5)},
        "clip_g": {"hidden": torch.full((2, 77, 32), 2.0), "pooled": torch.full((2, 32), 2.5)},
        "t5": {"hidden": torch.full((2, 16, 64), 3.0)},
    }


def test_conditioning_is_clip_padded_in_width_and_then_t5(make, transformer) -> None:
    prompt_embeds, pooled = make().conditioning(embeddings(), transformer)
    assert prompt_embeds.shape == (2, 77 + 16, 64)
    assert (prompt_embeds[:, :77, :16] == 1).all()
    assert (prompt_embeds[:, :77, 16:48] == 2).all()
    assert (prompt_embeds[:, :77, 48:] == 0).all()
    assert (prompt_embeds[:, 77:] == 3).all()
    assert pooled.tolist() == [[1.5] * 16 + [2.5] * 32] * 2


def test_without_t5_its_place_is_zeros_and_it_is_not_encoded(make, transformer) -> None:
    method = make("model.t5=false")
    assert method.cached_encoders == ("clip_l", "clip_g")
    entries = embeddings()
    del entries["t5"]
    prompt_embeds, _ = method.conditioning(entries, transformer)
    assert prompt_embeds.shape == (2, 77 + 16, 64)
    assert not prompt_embeds[:, 77:].any()


def test_conditioning_has_the_transformers_dtype(make) -> None:
    transformer = load_transformer(resolve_base("tiny"), torch.bfloat16)
    assert {tensor.dtype for tensor in make().conditioning(embeddings(), transformer)} == {torch.bfloat16}


@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_the_exported_file_computes_what_was_trained(velocity, make, transformer, tmp_path: Path, alpha: float) -> None:
    method = make(f"method.alpha={alpha}")
    master = inject(method, transformer)
    trained, base = velocity(transformer), velocity(load_transformer(resolve_base("tiny"), torch.float32))
    assert not torch.allclose(trained, base, atol=1e-2)

    file = method.export(tmp_path / "adapter", master.named(master.master), CONTRACT)
    loaded = load_transformer(resolve_base("tiny"), torch.float32)
    match = attach(loaded, adapter_io.read_adapter(file), "default")
    assert match.unmatched == ()
    torch.testing.assert_close(velocity(loaded), trained, rtol=0, atol=1e-5)
    with method.as_exported(transformer, master.named(master.master)):
        assert torch.equal(velocity(transformer), velocity(loaded))


def test_other_weights_visit_and_leave_no_trace(velocity, make, transformer) -> None:
    method = make("method.alpha=3.0")
    master = inject(method, transformer)
    live, pointers = velocity(transformer), [parameter.data_ptr() for parameter in master.parameters]
    values = master.master.detach().clone()
    average = master.named(0.5 * master.master.detach())
    with method.as_exported(transformer, average):
        assert not torch.equal(velocity(transformer), live)
    assert torch.equal(velocity(transformer), live)
    assert torch.equal(master.master, values)
    assert [parameter.data_ptr() for parameter in master.parameters] == pointers
    master.publish()


def test_the_live_weights_return_after_an_error(velocity, make, transformer) -> None:
    method = make("method.alpha=3.0")
    master = inject(method, transformer)
    live = velocity(transformer)
    for context in (method.as_exported(transformer, master.named(0 * master.master)), method.disabled(transformer)):
        with pytest.raises(KeyboardInterrupt), context:
            raise KeyboardInterrupt
        assert torch.equal(velocity(transformer), live)
    master.publish()


def test_low_precision_exports_its_masters_and_shows_them_rounded(make, tmp_path: Path) -> None:
    transformer = load_transformer(resolve_base("tiny"), torch.bfloat16)
    method = make()
    master = inject(method, transformer, torch.bfloat16)
    weights = master.named(master.master)
    factors = adapter_io.read_adapter(method.export(tmp_path, weights, CONTRACT)).factors
    for module, (down, up) in factors.items():
        assert torch.equal(down, weights[f"{module}.lora_A"])
        assert torch.equal(up, weights[f"{module}.lora_B"])
    with method.as_exported(transformer, weights):
        for name, layer in lora_layers(transformer).items():
            shown = layer.lora_A[ADAPTER_NAME].weight
            assert torch.equal(shown, weights[f"{name}.lora_A"].to(torch.bfloat16))


def test_disabled_is_the_base(velocity, make, transformer) -> None:
    method, base = make(), velocity(transformer)
    inject(method, transformer)
    with method.disabled(transformer):
        assert torch.equal(velocity(transformer), base)
    assert not torch.equal(velocity(transformer), base)


def test_the_file_holds_the_contract_and_the_original_rank_and_alpha(make, transformer, tmp_path: Path) -> None:
    method = make("method.alpha=3.0")
    master = inject(method, transformer)
    file = method.export(tmp_path, master.named(master.master), {**method.contract(), **CONTRACT})
    assert adapter_io.read_adapter(file).contract == {
        "contract_version": 1, "method": "lora", "rank": 2, "alpha": 3.0, **CONTRACT,
    }  # fmt: skip
    with safe_open(file, framework="pt") as opened:
        peft = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert peft["transformer.r"] == peft["transformer.lora_alpha"] == 2


def test_weights_that_are_not_finite_are_not_written(make, transformer, tmp_path: Path) -> None:
    method = make()
    master = inject(method, transformer)
    with torch.no_grad():
        master.master[3] = float("nan")
    with pytest.raises(adapter_io.AdapterError, match="NaN or infinite"):
        method.export(tmp_path / "adapter", master.named(master.master), CONTRACT)
    assert not (tmp_path / "adapter").exists() or not list((tmp_path / "adapter").iterdir())


def exported_scale(method: LoraMethod, weights: dict[str, Tensor]) -> dict[str, float]:
    """By how much each module's B was multiplied."""
    found = method.exported(weights)
    return {
        name.removesuffix(".lora_B"): (found[name] / weights[name]).flatten()[0].item()
        for name in weights
        if name.endswith(".lora_B")
    }


MIXED = ("method.rank=4", "method.alpha=6.0", "method.rank_pattern={attn.to_k: 8, 're:.*\\.0\\..*': 2}",
         "method.alpha_pattern={transformer_blocks.1.attn.to_k: 2.0}")  # fmt: skip


@pytest.mark.parametrize("rslora", [False, True])
def test_the_file_folds_each_modules_own_scale(velocity, make, transformer, tmp_path: Path, rslora: bool) -> None:
    """Scales by hand: alpha / r, or alpha / sqrt r, with the first pattern that fits."""
    method = make(*MIXED, f"method.rslora={str(rslora).lower()}", "method.targets=[attn.to_q, attn.to_k]")
    master = inject(method, transformer)
    weights = master.named(master.master)
    root = (lambda rank: rank**0.5) if rslora else (lambda rank: rank)
    expected = {
        "transformer_blocks.0.attn.to_q": 6 / root(2), "transformer_blocks.0.attn.to_k": 6 / root(8),
        "transformer_blocks.1.attn.to_q": 6 / root(4), "transformer_blocks.1.attn.to_k": 2 / root(8),
        "transformer_blocks.2.attn.to_q": 6 / root(4), "transformer_blocks.2.attn.to_k": 6 / root(8),
        "transformer_blocks.3.attn.to_q": 6 / root(4), "transformer_blocks.3.attn.to_k": 6 / root(8),
    }  # fmt: skip
    assert exported_scale(method, weights) == pytest.approx(expected, rel=1e-6)
    trained = velocity(transformer)
    file = method.export(tmp_path, weights, CONTRACT)
    loaded = load_transformer(resolve_base("tiny"), torch.float32)
    attach(loaded, adapter_io.read_adapter(file), "default")
    torch.testing.assert_close(velocity(loaded), trained, rtol=0, atol=1e-5)
    with method.as_exported(transformer, weights):
        assert torch.equal(velocity(transformer), velocity(loaded))
    assert torch.equal(velocity(transformer), trained)


def test_the_contract_states_what_is_not_the_default(make) -> None:
    assert make().contract() == {"method": "lora", "rank": 2, "alpha": 2.0}
    overrides = ("method.rslora=true", "method.blocks=[0-1, 3]", "method.dropout=0.1", "method.init=gaussian")
    assert make(*overrides, "method.targets=attention-image").contract() == {
        "method": "lora", "rank": 2, "alpha": 2.0, "rslora": True, "blocks": ["0-1", 3], "dropout": 0.1,
        "init": "gaussian", "targets": "attention-image",
    }  # fmt: skip


def test_a_pattern_for_no_trained_module_is_refused(make, transformer) -> None:
    method = make("method.targets=attention-image", "method.rank_pattern={attn.add_k_proj: 4}")
    with pytest.raises(UserError, match=r"method.rank_pattern: 'attn.add_k_proj' matches none of the trained modules"):
        method.coverage(transformer)


def test_the_coverage_table_knows_the_patterns(make, transformer) -> None:
    method = make("method.targets=[attn.to_q, attn.to_k]", "method.rank_pattern={attn.to_k: 5}")
    assert [(row.module, row.parameters) for row in method.coverage(transformer)] == [
        ("attn.to_q", 4 * 2 * 128), ("attn.to_k", 4 * 5 * 128),
    ]  # fmt: skip


# Dropout.


def test_dropout_acts_where_it_is_asked_for_and_nowhere_else(velocity, make, transformer) -> None:
    method = make("method.dropout=0.5")
    master = inject(method, transformer)
    whole = velocity(transformer)
    with method.regularised(transformer, 1):
        first = velocity(transformer)
        assert torch.equal(velocity(transformer), first)  # as when a block is recomputed
    with method.regularised(transformer, 2):
        second = velocity(transformer)
    assert not torch.equal(first, whole)
    assert not torch.equal(first, second)
    assert torch.equal(velocity(transformer.train()), whole)
    weights = master.named(master.master)
    with method.as_exported(transformer, weights):
        shown = velocity(transformer)
    plain = make()
    other = load_transformer(resolve_base("tiny"), torch.float32)
    same = inject(plain, other)
    with plain.as_exported(other, same.named(same.master)):
        assert torch.equal(velocity(other), shown)


def test_dropout_ends_with_an_error(velocity, make, transformer) -> None:
    method = make("method.dropout=0.5")
    inject(method, transformer)
    whole = velocity(transformer)
    with pytest.raises(KeyboardInterrupt), method.regularised(transformer, 1):
        raise KeyboardInterrupt
    assert torch.equal(velocity(transformer), whole)


def test_dropout_is_on_the_adapters_input(make, transformer) -> None:
    """One layer by hand: W x + scale B A d(x), with what dropout itself makes of x."""
    method = make("method.dropout=0.25", "method.alpha=3.0")
    inject(method, transformer)
    layer = lora_layers(transformer)["transformer_blocks.0.attn.to_q"]
    x = torch.randn(2, 7, 64, generator=generator(3))
    with method.regularised(transformer, 9), torch.no_grad():
        dropped = layer.lora_dropout[ADAPTER_NAME](x)
        assert not torch.equal(dropped, x)
        a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 1.5 * dropped @ a.T @ b.T)


@pytest.mark.parametrize(("exported", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_rounded_file_is_what_previews_compute(velocity, make, transformer, tmp_path, exported, dtype) -> None:
    method = make("method.alpha=3.0", f"method.export_dtype={exported}")
    master = inject(method, transformer)
    weights = master.named(master.master)
    file = method.export(tmp_path / "adapter", weights, {**method.contract(), **CONTRACT})
    adapter = adapter_io.read_adapter(file)
    assert {factor.dtype for pair in adapter.factors.values() for factor in pair} == {dtype}
    assert adapter.contract["export_dtype"] == exported
    loaded = load_transformer(resolve_base("tiny"), torch.float32)
    attach(loaded, adapter, "default")
    with method.as_exported(transformer, weights):
        rounded = velocity(transformer)
    unrounded = method.unrounded(transformer, weights)
    assert unrounded is not None
    with unrounded:
        assert not torch.equal(rounded, velocity(transformer))
    assert torch.equal(rounded, velocity(loaded))


def test_the_default_precision_is_neither_stated_nor_compared(make) -> None:
    method = make()
    assert (method.exported_bytes, method.unrounded(None, {})) == (4, None)
    assert "export_dtype" not in method.contract()
    assert "export_dtype" not in method.identity()  # earlier versions did not write it, and their runs resume
    assert make("method.export_dtype=bf16").identity()["export_dtype"] == "bf16"


def test_a_value_beyond_fp16_is_not_written(make, transformer, tmp_path: Path) -> None:
    method = make("method.export_dtype=fp16")
    master = inject(method, transformer)
    with torch.no_grad():
        master.master[3] = 1e6
    with pytest.raises(adapter_io.AdapterError, match="a wider range"):
        method.export(tmp_path / "adapter", master.named(master.master), CONTRACT)


def test_magnitudes_are_not_rounded(quick_config, transformer, tmp_path: Path) -> None:
    """As large as norms of weights, they would lose a training that changes them by less than a bf16 digit."""
    config = quick_config(tmp_path / "run", "method={kind: dora, rank: 2, export_dtype: bf16}")
    method = METHODS["dora"](config, resolve_base("tiny"))
    parameters = method.inject(transformer, lambda name: generator(0, name))
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    saved = load_file(method.export(tmp_path, weights, CONTRACT))
    magnitudes = {key: value for key, value in saved.items() if "magnitude" in key}
    assert {value.dtype for value in magnitudes.values()} == {torch.float32}
    assert {value.dtype for key, value in saved.items() if key not in magnitudes} == {torch.bfloat16}
    for name, value in method.exported(weights).items():
        assert "magnitude" not in name or torch.equal(value, weights[name])

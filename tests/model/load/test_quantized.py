"""Layers in 4 and 8 bits: weights are what their formulas say, also below an adapter."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5EncoderModel

from sd3tune.adapter.attach import attach
from sd3tune.adapter.file import read_adapter, write_adapter
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_text_encoder, load_transformer
from sd3tune.model.load.quantized import FORMS, Form, Int8Linear, load_transformer_in, missing_library, quantize
from sd3tune.model.lora.layers import lora_layers

bitsandbytes = pytest.importorskip("bitsandbytes")

# The 16 values of NF4, from appendix E of Dettmers et al. 2023.
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
MODULES = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2")


def in_nf4(weight: Tensor) -> Tensor:
    """Each block of 64 by the nearest of the values, scaled by its largest."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(NF4).abs().argmin(dim=-1)
    return (NF4[nearest] * largest).reshape(weight.shape)


def in_int8(weight: Tensor) -> Tensor:
    """Each row in steps of a 127th of its largest."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.fixture(scope="module")
def plain() -> SD3Transformer2DModel:
    return load_transformer(resolve_base("nano"), torch.float32)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = torch.Generator().manual_seed(0)
    factors = {}
    for module, width in zip(MODULES, (192, 768), strict=True):
        factors[f"{module}.lora_A"] = torch.randn(4, width, generator=source) / 8
        factors[f"{module}.lora_B"] = torch.randn(192, 4, generator=source) / 8
    return write_adapter(tmp_path_factory.mktemp("adapter"), factors, {})


def rounded(plain: SD3Transformer2DModel, form: str) -> SD3Transformer2DModel:
    """The transformer whose blocks hold, in fp32, what is left of their weights."""
    model = copy.deepcopy(plain)
    for layer in quantisable(model):
        layer.weight.data = {"nf4": in_nf4, "int8": in_int8}[form](layer.weight.data)
    return model


def quantisable(model: SD3Transformer2DModel) -> list[nn.Linear]:
    """The blocks' linear layers but adaLN's, which keep the model's precision."""
    named = model.transformer_blocks.named_modules()
    return [layer for name, layer in named if isinstance(layer, nn.Linear) and ".norm" not in name]


def quantized(plain: SD3Transformer2DModel, form: str) -> SD3Transformer2DModel:
    model = copy.deepcopy(plain)
    quantize(model, model.transformer_blocks, form, "cpu")
    return model


@torch.no_grad()
def velocity(model: SD3Transformer2DModel) -> Tensor:
    source = torch.Generator().manual_seed(1)
    inputs: Mapping[str, Tensor] = {
        "hidden_states": torch.randn(1, 16, 8, 8, generator=source),
        "timestep": torch.tensor([400.0]),
        "encoder_hidden_states": torch.randn(1, 93, model.config.joint_attention_dim, generator=source),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, generator=source),
    }
    found: Tensor = model(**inputs).sample
    return found


def relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def test_weights_in_nf4_are_the_nearest_of_its_values(plain) -> None:
    layer = quantized(plain, "nf4").transformer_blocks[0].attn.to_q
    held = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(held, in_nf4(plain.transformer_blocks[0].attn.to_q.weight.data), rtol=0, atol=1e-6)


# Processors with bf16 compute with nf4 in bf16: below the 0.08 of nf4's own rounding.
@pytest.mark.parametrize(("form", "most"), [("nf4", 0.02), ("int8", 1e-5)])
def test_a_model_computes_with_the_rounded_weights(form: str, most: float, plain, adapter: Path) -> None:
    ours, theirs = quantized(plain, form), rounded(plain, form)
    for model in (ours, theirs):
        attach(model, read_adapter(adapter), "lora")
    assert relative(velocity(ours), velocity(theirs)) < most
    assert relative(velocity(ours), velocity(plain)) > 0.05, "the adapter acts"
    for model in (ours, theirs):
        model.disable_adapters()
    assert relative(velocity(ours), velocity(theirs)) < most
    assert relative(velocity(ours), velocity(plain)) > 1e-3, "not in full precision"


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_has_the_precision_that_is_computed_in(form: str, adapter: Path) -> None:
    model = load_transformer_in(form, resolve_base("nano"), torch.bfloat16, torch.device("cpu"))
    attach(model, read_adapter(adapter), "lora")
    weights = [layer.lora_A["lora"].weight for layer in lora_layers(model).values()]
    assert [weight.dtype for weight in weights] == [torch.bfloat16] * len(MODULES)


@pytest.mark.parametrize(("form", "share"), [("nf4", 0.16), ("int8", 0.27)])
def test_the_blocks_take_a_quarter_or_an_eighth_of_the_memory(form: str, share: float, plain) -> None:
    def nbytes(model: SD3Transformer2DModel) -> int:
        layers = quantisable(model)
        states = [getattr(layer.weight, "quant_state", None) for layer in layers]
        return sum(layer.weight.nbytes for layer in layers) + sum(state.absmax.nbytes for state in states if state)

    assert nbytes(quantized(plain, form)) < share * nbytes(plain)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_the_weights_as_they_are_held(form: str, plain) -> None:
    """As bitsandbytes itself has them; also after a use without gradients, at which some CPUs repack 4-bit weights."""
    ours = quantized(plain, form).transformer_blocks[0].ff.net[2]
    held = {"nf4": in_nf4, "int8": in_int8}[form](plain.transformer_blocks[0].ff.net[2].weight.data)
    states = torch.randn(3, 7, held.shape[1], requires_grad=True)
    with torch.no_grad():
        before = ours(states.detach())
    outputs = ours(states)
    towards = torch.randn_like(outputs)
    (gradient,) = torch.autograd.grad(outputs, states, towards, retain_graph=True)
    assert torch.equal(outputs, before)
    assert relative(gradient, towards @ held) < {"nf4": 1e-2, "int8": 1e-6}[form]
    theirs = next((kind for kind in type(ours).__mro__ if kind.__module__.startswith("bitsandbytes")), None)
    if theirs is not None:
        assert torch.equal(torch.autograd.grad(theirs.forward(ours, states), states, towards)[0], gradient)


@pytest.mark.parametrize("form", FORMS)
def test_no_activation_is_kept_for_the_backward_pass(form: str, plain) -> None:
    """Nor are the dequantised weights."""
    layer = quantized(plain, form).transformer_blocks[0].ff.net[2]
    states = torch.randn(2, layer.in_features, requires_grad=True) * 1
    known, outputs = weakref.ref(states), layer(states)
    del states
    assert outputs.requires_grad
    assert known() is None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, layer.in_features, requires_grad=True))
    assert not kept


def test_each_layer_is_freed_before_the_next_one_moves_to_the_device(monkeypatch) -> None:
    seen: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []

    def counted(layer: nn.Linear) -> nn.Module:
        alive.append(sum(known() is not None for known in seen))
        seen.append(weakref.ref(layer))
        return Int8Linear(layer)

    monkeypatch.setitem(FORMS, "int8", Form(counted))
    model = load_text_encoder(resolve_base("tiny"), "t5", torch.float32).model
    quantize(model, model, "int8", "cpu")
    assert len(alive) > 10
    assert max(alive) <= 1  # the one before


class DependsOnValues(TorchDispatchMode):
    """Collects the operations whose results' shapes or whose host values depend on a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
def test_no_product_waits_for_the_values_on_the_device(form: str, plain) -> None:
    layer = quantized(plain, form).transformer_blocks[0].ff.net[2]
    states = torch.randn(2, layer.in_features, requires_grad=True)
    with DependsOnValues() as waits:
        layer(10 * states).sum().backward()
    assert not waits.found


@pytest.mark.parametrize(("base", "most"), [("nano", 0.009), ("tiny", 0.005)])
def test_int8_changes_the_velocity_by_less_than_a_hundredth(base: str, most: float) -> None:
    """Against the whole weights in fp32: 0.0071 for nano and 0.0039 for tiny; LLM.int8() had 0.0157 and 0.0054."""
    whole = load_transformer(resolve_base(base), torch.float32)
    error = relative(velocity(quantized(whole, "int8")), velocity(whole))
    assert most / 2 < error < most


def test_float8_would_change_the_velocity_more_than_three_times_as_much(plain) -> None:
    """With the same bytes: one scale per row. This is why there is no such form."""
    in_float8 = copy.deepcopy(plain)
    for layer in quantisable(in_float8):
        scale = layer.weight.data.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        layer.weight.data = (layer.weight.data / scale).to(torch.float8_e4m3fn).float() * scale
    whole = velocity(plain)
    assert relative(velocity(in_float8), whole) > 3 * relative(velocity(quantized(plain, "int8")), whole)


def test_rows_of_zeros_and_of_one_value_are_exact() -> None:
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[0.0, 0.0, 0.0], [0.3, -0.3, 0.3]])
    held = FORMS["int8"].make(layer)
    torch.testing.assert_close(held.read_back(torch.float32), layer.weight.data, rtol=1e-7, atol=0)
    assert [(name, tensor.dtype) for name, tensor in held.state_dict().items()] == [("weight", torch.int8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_t5_in_8_bits_with_large_values_in_its_feed_forward_says_nearly_the_same(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """As T5-XXL has, whose `wo` overflows in fp16 and lost its meaning where 8-bit products round activations, too."""
    torch.manual_seed(0)
    shape = {"d_model": 64, "d_ff": 128, "num_layers": 3, "num_heads": 2, "d_kv": 32, "vocab_size": 100}
    model = T5EncoderModel(T5Config(**shape, feed_forward_proj="gated-gelu")).eval()
    model.encoder.block[1].layer[1].DenseReluDense.wo.weight.data *= 1e5
    model.save_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        exact = model(ids)[0]
        quantised = T5EncoderModel.from_pretrained(tmp_path, dtype=dtype).eval()
        quantize(quantised, quantised, "int8", "cpu")
        found = quantised(ids)[0].float()
    assert (found - exact).norm() / exact.norm() < 0.03


def test_t5_in_8_bits_says_nearly_the_same() -> None:
    encoder = load_text_encoder(resolve_base("nano"), "t5", torch.float32, "cpu", 16)
    plain = encoder.encode(["a red circle on a blue background"])[0]["hidden"]
    quantize(encoder.model, encoder.model, "int8", "cpu")
    assert not [layer for layer in encoder.model.modules() if type(layer) is nn.Linear]
    found = encoder.encode(["a red circle on a blue background"])[0]["hidden"]
    assert found.dtype is torch.float32
    assert 0 < relative(found, plain) < 0.015


def test_a_missing_library_is_one_line_with_the_way_to_get_it(monkeypatch) -> None:
    assert missing_library("--quantize", "nf4") == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = ["--quantize needs bitsandbytes: pip install 'sd3tune[bitsandbytes]'"]
    assert missing_library("--quantize", "nf4") == said
    assert missing_library("--quantize", "int8") == []


def test_peft_knows_each_form() -> None:
    """Its layer for any linear layer serves int8."""
    assert {name: form.flags for name, form in FORMS.items()} == {"nf4": ("is_loaded_in_4bit",), "int8": ()}

"""The fast path against diffusers' and PEFT's own way, in float64 where rounding leaves nothing to argue about."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.normalization import RMSNorm
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sd3tune.data.sampler import generator
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.compute.fast import cpu, plain_path, use_fast_path
from sd3tune.model.compute.fast.attention import SHORT, attention_dtype
from sd3tune.model.compute.fast.lora import adapted, fused_linears, linear
from sd3tune.model.compute.fast.norm import is_invertible, join_normalised
from sd3tune.model.load.components import load_transformer
from sd3tune.model.load.quantized import FORMS, load_transformer_in
from sd3tune.model.lora.layers import ADAPTER_NAME, Layer, inject_lora, lora_layers
from sd3tune.model.lora.targets import select_modules

BASES = ("tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large")


def adapted_model(
    base: str, dtype: torch.dtype, targets: str = "attention+mlp", form: str = "none", ranks=(4, 5, 6), **options
) -> SD3Transformer2DModel:
    """A tiny base with factors of unequal ranks, and B not zero, in `dtype`."""
    transformer = load_transformer_in(form, resolve_base(base), torch.float32, torch.device("cpu"))
    modules = select_modules(transformer, targets, None)
    of = len(ranks)
    layers = {name: Layer(ranks[n % of], 8.0, rslora=of > 1 and n % 2 == 0) for n, name in enumerate(modules)}
    parameters = inject_lora(transformer, layers, lambda name: generator(0, name), **options)
    for name, parameter in parameters.items():
        if name.endswith(".lora_B"):
            parameter.data.normal_(std=0.05, generator=generator(1, name))
    return nn.Module.to(transformer, dtype)


def exact(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """With torch's RMSNorm: diffusers' own takes its statistics in fp32 even where all else is float64."""
    for parent in list(transformer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RMSNorm):
                norm = nn.RMSNorm(child.dim, eps=child.eps, dtype=child.weight.dtype).requires_grad_(False)
                norm.weight.data.copy_(child.weight)
                setattr(parent, name, norm)
    return transformer


def inputs(transformer: SD3Transformer2DModel, dtype: torch.dtype) -> dict[str, Tensor]:
    config, source = transformer.config, generator(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(dtype)

    return {
        "hidden_states": draw(2, 16, 12, 8),
        "timestep": torch.tensor([250.0, 900.0]),
        "encoder_hidden_states": draw(2, 21, config.joint_attention_dim),
        "pooled_projections": draw(2, config.pooled_projection_dim),
    }


def run(transformer: SD3Transformer2DModel, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Tensor]]:
    """The velocity, and the gradient of its product with something fixed, by parameter."""
    velocity = transformer(**inputs(transformer, dtype), return_dict=False)[0]
    transformer.zero_grad()
    (velocity.double() * torch.randn(velocity.shape, generator=generator(3)).double()).sum().backward()
    return velocity.detach(), {n: p.grad for n, p in transformer.named_parameters() if p.grad is not None}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def total_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert list(found) == list(expected)
    flat = [torch.cat([gradient.double().reshape(-1) for gradient in of.values()]) for of in (found, expected)]
    return error(*flat)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("targets", ["attention+mlp", r"re:transformer_blocks\..*"])
def test_outputs_and_gradients_are_the_same_in_float64(base: str, targets: str) -> None:
    """Also where the layers are trained that make scales, shifts and gates."""
    transformer = adapted_model(base, torch.float64, targets)
    velocity, gradients = run(exact(copy.deepcopy(transformer)))
    use_fast_path(transformer)
    fast_velocity, fast_gradients = run(transformer)
    assert len(gradients) == 2 * len(lora_layers(transformer))
    assert error(fast_velocity, velocity) < 1e-13
    for name, gradient in gradients.items():
        assert error(fast_gradients[name], gradient) < 1e-11, name


@pytest.mark.parametrize("norm", ["norm_q", "norm_k", "norm_added_q", "norm_added_k"])
def test_a_weight_of_zero_in_a_norm_of_queries_or_keys_costs_no_gradient(norm: str) -> None:
    transformer = adapted_model("tiny", torch.float64, "attention")
    transformer.get_submodule(f"transformer_blocks.1.attn.{norm}").weight.data[3] = 0
    velocity, gradients = run(exact(copy.deepcopy(transformer)))
    use_fast_path(transformer)
    fast_velocity, fast_gradients = run(transformer)
    assert error(fast_velocity, velocity) < 1e-13
    for name, gradient in gradients.items():
        assert error(fast_gradients[name], gradient) < 1e-11, name


def whole_model(base: str, dtype: torch.dtype) -> SD3Transformer2DModel:
    """A tiny base all of which is trained."""
    return load_transformer(resolve_base(base), torch.float32).to(dtype).requires_grad_(True)


@pytest.mark.parametrize("base", BASES)
def test_a_model_that_is_trained_whole_has_the_same_gradients_in_float64(base: str) -> None:
    transformer = whole_model(base, torch.float64)
    velocity, gradients = run(exact(copy.deepcopy(transformer)).requires_grad_(True))
    use_fast_path(transformer)
    fast_velocity, fast_gradients = run(transformer)
    assert set(fast_gradients) == set(gradients) == {name for name, _ in transformer.named_parameters()}
    assert error(fast_velocity, velocity) < 1e-13
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, rtol=1e-11, atol=1e-13 * largest, msg=name)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_larger_where_all_is_trained(base: str, dtype: torch.dtype) -> None:
    transformer = whole_model(base, dtype)
    truth, true_gradients = run(exact(copy.deepcopy(transformer).double()).requires_grad_(True))
    plain, plain_gradients = run(transformer, dtype)
    use_fast_path(transformer)
    fast, gradients = run(transformer, dtype)
    assert error(fast, truth) < max(2e-6, 1.1 * error(plain, truth))
    assert total_error(gradients, true_gradients) < max(2e-6, 1.1 * total_error(plain_gradients, true_gradients))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, None), (torch.float16, None)])
def test_rounding_is_no_larger_than_on_the_plain_path(base: str, dtype: torch.dtype, bound: float | None) -> None:
    """In fp32 the bound that the documentation states; below, the plain path's own error."""
    transformer = adapted_model(base, dtype)
    truth, true_gradients = run(exact(copy.deepcopy(transformer).double()))
    plain, plain_gradients = run(transformer, dtype)
    use_fast_path(transformer)
    fast, gradients = run(transformer, dtype)
    limits = (
        (bound, bound) if bound else (1.1 * error(plain, truth), 1.1 * total_error(plain_gradients, true_gradients))
    )
    assert error(fast, truth) < limits[0]
    assert total_error(gradients, true_gradients) < limits[1]


def test_parameters_and_their_names_stay() -> None:
    transformer = adapted_model("tiny", torch.float32)
    before = {name: tensor.data_ptr() for name, tensor in transformer.state_dict().items()}
    use_fast_path(transformer)
    run(transformer, torch.float32)
    assert {name: tensor.data_ptr() for name, tensor in transformer.state_dict().items()} == before


def test_on_the_plain_path_all_is_as_diffusers_has_it_to_the_bit() -> None:
    transformer = adapted_model("tiny", torch.float32)
    velocity, gradients = run(transformer, torch.float32)
    use_fast_path(transformer)
    fast = run(transformer, torch.float32)[0]
    with plain_path(transformer):
        plain, plain_gradients = run(transformer, torch.float32)
    again = run(transformer, torch.float32)[0]
    assert torch.equal(plain, velocity)
    assert all(torch.equal(plain_gradients[name], gradients[name]) for name in gradients)
    assert not torch.equal(fast, velocity), "the fast path was not taken"
    assert torch.equal(again, fast), "the fast path was not taken up again"


def test_recomputed_blocks_have_the_same_gradients_to_the_bit() -> None:
    transformer = adapted_model("tiny", torch.float32)
    use_fast_path(transformer)
    kept = run(transformer.train(), torch.float32)[1]
    transformer.enable_gradient_checkpointing()
    recomputed = run(transformer, torch.float32)[1]
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)


def disabled(layer: nn.Module) -> None:
    layer.enable_adapters(False)


def merged(layer: nn.Module) -> None:
    layer.merge()


def second(layer: nn.Module) -> None:
    layer.update_layer("other", r=2, lora_alpha=2, config=LoraConfig(init_lora_weights=False))
    layer.set_adapter(["default", "other"])


def dropped(layer: nn.Module) -> None:
    layer.lora_dropout[ADAPTER_NAME] = nn.Dropout(0.0)


def trained_base(layer: nn.Module) -> None:
    layer.base_layer.weight.requires_grad_(True)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_base_takes_the_fast_way_below_its_lora(form: str) -> None:
    """A layer at a time: beyond it, codes of nearly equal inputs may differ by a step."""
    pytest.importorskip("bitsandbytes")
    transformer = adapted_model("tiny", torch.float32, form=form)
    attention = transformer.transformer_blocks[0].attn
    layers = [attention.to_q, attention.to_k, attention.to_v]
    assert all(adapted(layer) is not None for layer in layers)
    states = torch.randn(2, 5, layers[0].in_features, generator=generator(4), requires_grad=True)
    plain = [layer(states) for layer in layers]
    fast = fused_linears(layers, states)
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    wanted = [states, *(of[ADAPTER_NAME].weight for layer in layers for of in (layer.lora_A, layer.lora_B))]
    towards = [torch.randn_like(one) for one in plain]
    expected, found = (torch.autograd.grad(outputs, wanted, towards) for outputs in (plain, fast))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("change", [disabled, merged, second, dropped, trained_base])
def test_what_is_not_one_plain_lora_is_left_to_peft(change: Callable[[nn.Module], None]) -> None:
    transformer = adapted_model("tiny", torch.float32)
    layer = lora_layers(transformer)["transformer_blocks.0.attn.to_q"]
    states = torch.randn(2, 5, layer.in_features, generator=generator(4))
    assert adapted(layer) is not None
    assert not torch.equal(linear(layer, states), layer.base_layer(states))
    change(layer)
    assert adapted(layer) is None
    assert torch.equal(linear(layer, states), layer(states))


def test_dropout_acts_while_it_is_drawn_and_only_then() -> None:
    transformer = adapted_model("tiny", torch.float32, dropout=0.5)
    layer = lora_layers(transformer)["transformer_blocks.0.attn.to_q"]
    assert adapted(layer) is not None
    layer.lora_dropout[ADAPTER_NAME].draw(1)
    assert adapted(layer) is None
    layer.lora_dropout[ADAPTER_NAME].draw(None)
    assert adapted(layer) is not None


def test_short_sequences_attend_in_fp32_on_the_cpu() -> None:
    """All tokens count, the image's and the text's."""
    image, text = torch.zeros(1, SHORT - 16, 8), torch.zeros(1, 16, 8)
    for dtype in (torch.bfloat16, torch.float16):
        assert attention_dtype(image.to(dtype), text.to(dtype)) is torch.float32
        assert attention_dtype(image.to(dtype), torch.cat([text, text], dim=1).to(dtype)) is dtype
        assert attention_dtype(image.to(dtype), None) is torch.float32
    assert attention_dtype(image.double(), None) is torch.float64


@pytest.mark.parametrize(
    ("spread", "offset", "outliers", "limit"),
    [(0.3, 0, 1, 0.004), (1, 0, 1, 0.005), (2, 0, 1, 0.005), (3, 0, 1, 0.006), (1, 3, 1, 0.008), (1, 0, 6, 0.01)],
)
def test_attention_in_bf16_is_as_exact_however_large_its_scores(
    spread: float, offset: float, outliers: float, limit: float
) -> None:
    """Scores of up to 50; a score rounded as it is would be off by a tenth, and gradients by several hundredths.

    Queries and keys may share a direction, and a hundredth of the keys be outliers.
    """
    source = generator(7)
    given = [torch.randn(1, 2, 600, 64, generator=source).mul(by) for by in (spread, spread, 1)]
    shared = offset * torch.randn(64, generator=source)
    given = [given[0] + shared, given[1] + shared, given[2]]
    given[1][:, :, ::100] *= outliers
    given = [of.bfloat16() for of in given]
    direction = torch.randn(1, 2, 600, 64, generator=source)

    def results(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        states = [of.to(dtype).requires_grad_() for of in given]
        output = attend(*states)
        return [output.detach(), *torch.autograd.grad(output, states, direction.bfloat16().to(dtype))]

    expected = results(nn.functional.scaled_dot_product_attention, torch.float64)
    for found, exact_one in zip(results(cpu.Attention.apply, torch.bfloat16), expected, strict=True):
        assert error(found, exact_one) < limit


@pytest.mark.parametrize("heads", [3, 4])
def test_attention_in_bf16_is_the_same_to_the_bit_on_two_threads_and_strided(heads: int) -> None:
    """As it gets its input, heads behind tokens. All other operations keep the threads that they had."""
    source = generator(7)
    given = [torch.randn(2, heads, 600, 64, generator=source).bfloat16() for _ in range(4)]
    strided = [of.transpose(1, 2).contiguous().transpose(1, 2) for of in given]

    def results(threads: int, given: list[Tensor]) -> list[Tensor]:
        torch.set_num_threads(threads)
        states = [of.detach().requires_grad_() for of in given[:3]]
        output = cpu.Attention.apply(*states)
        found = [output.detach(), *torch.autograd.grad(output, states, given[3])]
        assert torch.get_num_threads() == threads
        return found

    before = torch.get_num_threads()
    try:
        expected = results(1, given)
        for found in (results(2, given), results(2, strided), results(1, strided)):
            assert all(map(torch.equal, found, expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("thread", [0, 1])
def test_an_error_on_a_thread_of_attention_comes_out_and_leaves_the_threads(thread: int) -> None:
    def work(room: Tensor, head: Tensor) -> None:
        if head.item() == thread:
            raise MemoryError("no room for the scores")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError, match="no room for the scores"):
            cpu._for_each_head(work, torch.empty(2, 1), torch.arange(4).view(1, 4, 1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_joined_rms_norms_are_the_formula_and_take_strided_input() -> None:
    norms = [RMSNorm(16, eps=1e-6).double().requires_grad_(False) for _ in range(2)]
    source = generator(5)
    for norm in norms:
        norm.weight.data.normal_(generator=source)
    parts = [
        torch.randn(2, 3, tokens, 16, generator=source, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for tokens in (7, 4)
    ]
    expected = [nn.functional.rms_norm(of, (16,), norm.weight, norm.eps) for norm, of in zip(norms, parts, strict=True)]
    for invertible in (False, True):
        found = join_normalised(norms, parts, invertible)
        torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=1e-13, atol=1e-13)
        assert torch.autograd.gradcheck(lambda *given, how=invertible: join_normalised(norms, given, how), parts)
    weights = [norm.weight.requires_grad_() for norm in norms]
    for invertible in (False, True):
        assert torch.autograd.gradcheck(
            lambda *given, how=invertible: join_normalised(norms, given[:2], how), [*parts, *weights]
        )


@pytest.mark.parametrize(("weight", "kept"), [(1e-3, "the result"), (1e-4, "the input"), (0, "the input")])
def test_a_norm_keeps_its_result_alone_unless_a_weight_is_about_zero(weight: float, kept: str) -> None:
    """Gradients are those of diffusers' module in either case."""
    norm = RMSNorm(16, eps=1e-6).requires_grad_(False)
    norm.weight.data[3] = weight
    assert is_invertible(norm) == (kept == "the result")
    states = torch.randn(2, 7, 3, 16, generator=generator(6)).requires_grad_()
    direction = torch.randn(2, 7, 3, 16, generator=generator(7))
    with saved_bytes() as storages:
        result = join_normalised([norm], [states], is_invertible(norm))
    assert (result.data_ptr() in storages, states.data_ptr() in storages) == (kept == "the result", kept == "the input")
    found, expected = (torch.autograd.grad(made, states, direction)[0] for made in (result, norm(states)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Count(TorchDispatchMode):
    """Counts the operations that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.calls += not function.is_view
        return function(*arguments, **(keywords or {}))


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Storage -> size, of what is kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def cost(transformer: SD3Transformer2DModel) -> tuple[int, int]:
    """Operations of forward and backward, and bytes of activations kept between them."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in transformer.state_dict().values()}
    with Count() as count, saved_bytes() as kept:
        run(transformer, torch.float32)
    return count.calls, sum(size for storage, size in kept.items() if storage not in weights)


@pytest.mark.parametrize("base", BASES)
def test_it_takes_fewer_operations_and_keeps_no_more(base: str) -> None:
    transformer = adapted_model(base, torch.float32, targets="attention")
    operations, kept = cost(transformer)
    use_fast_path(transformer)
    fast_operations, fast_kept = cost(transformer)
    assert fast_operations < 0.85 * operations
    assert fast_kept <= kept

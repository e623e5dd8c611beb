"""Attention kept by checkpointed blocks: equal gradients, memory by formula, and no Python around every operation."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _python_dispatch

from sd3tune.data.sampler import generator
from sd3tune.forecast.footprint import Footprint, SavedTensors, fused_attention
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.compute import kept
from sd3tune.model.compute.checkpointing import checkpoint_blocks
from sd3tune.model.compute.fast import use_fast_path
from sd3tune.model.load.components import load_transformer
from sd3tune.model.lora.layers import Layer, inject_lora
from sd3tune.model.lora.targets import select_modules

ROWS, IMAGE, TEXT = 2, 24, 21  # samples, and tokens of an image of 12x8 latents and of its caption
PATHS = pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])


def model(kind: str, fast: bool = True, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    transformer = load_transformer(resolve_base("tiny"), dtype)
    layers = {name: Layer(4, 4.0) for name in select_modules(transformer, "attention+mlp", None)}
    for name, parameter in inject_lora(transformer, layers, lambda name: generator(0, name)).items():
        parameter.data = parameter.data.normal_(std=0.05, generator=generator(1, name)).to(dtype)
    checkpoint_blocks(transformer, kind)
    if fast:
        use_fast_path(transformer)
    return transformer


def loss_of(transformer: SD3Transformer2DModel) -> Tensor:
    config, source = transformer.config, generator(2)

    def draw(*shape: int) -> Tensor:
        device = next(transformer.parameters()).device
        return torch.randn(shape, generator=source).to(device, transformer.dtype)

    velocity: Tensor = transformer(
        hidden_states=draw(ROWS, 16, 12, 8),
        timestep=draw(ROWS),
        encoder_hidden_states=draw(ROWS, TEXT, config.joint_attention_dim),
        pooled_projections=draw(ROWS, config.pooled_projection_dim),
        return_dict=False,
    )[0]
    return velocity.square().sum()


def gradients(transformer: SD3Transformer2DModel) -> list[Tensor]:
    return [parameter.grad for parameter in transformer.parameters() if parameter.grad is not None]


def backward(transformer: SD3Transformer2DModel) -> list[Tensor]:
    loss_of(transformer).backward()
    return gradients(transformer)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_a_block_that_keeps_all(fast: bool, dtype: torch.dtype) -> None:
    assert_equal(backward(model("selective", fast, dtype)), backward(model("none", fast, dtype)))


@PATHS
def test_a_kernel_that_keeps_the_matrix_of_all_pairs_is_recomputed(fast: bool) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert saved_bytes("selective", fast) == saved_bytes("block", fast)
        assert_equal(backward(model("selective", fast)), backward(model("none", fast)))


def run_in_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_blocks_are_recomputed_in_the_thread_of_the_backward_pass() -> None:
    """As on a GPU."""
    transformer = model("selective")
    run_in_a_thread(loss_of(transformer).backward)
    assert_equal(gradients(transformer), backward(model("none")))


def test_a_block_keeps_no_attention_of_another_thread() -> None:
    transformer, other = model("selective"), model("none")
    for parameter in other.parameters():
        parameter.data *= 0.5

    def interrupt(*_: object) -> None:
        hook.remove()
        run_in_a_thread(lambda: loss_of(other))

    hook = transformer.transformer_blocks[0].register_forward_pre_hook(interrupt)
    assert_equal(backward(transformer), backward(model("none")))


def test_a_second_backward_pass_through_one_graph_doubles_the_gradients() -> None:
    transformer = model("selective")
    loss = loss_of(transformer)
    loss.backward(retain_graph=True)
    once = [gradient.clone() for gradient in gradients(transformer)]
    loss.backward()
    assert_equal(gradients(transformer), [2 * gradient for gradient in once])


def test_only_adapters_behind_attention_are_trained() -> None:
    """Then attention needs no gradient in the first block, and its output is kept all the same."""
    found = []
    for kind in ("none", "selective"):
        transformer = model(kind)
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and ".ff" in name)
        found.append(backward(transformer))
    assert_equal(*found)


@PATHS
def test_operations_of_a_block_call_no_python_mode(fast: bool) -> None:
    transformer, modes = model("selective", fast), []
    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: modes.append(_python_dispatch._get_current_dispatch_mode_stack()))
    backward(transformer)
    assert modes == [[]] * 2 * len(transformer.transformer_blocks)


def saved_bytes(kind: str, fast: bool) -> int:
    transformer = model(kind, fast)
    saved = SavedTensors([*transformer.parameters(), *transformer.buffers()])
    with saved.watching():
        loss_of(transformer)
    return saved.nbytes


def alive_bytes(kind: str, fast: bool) -> int:
    """Bytes that live between the forward and the backward pass of a model on the meta device."""
    transformer = nn.Module.to(model(kind, fast), "meta")
    with fused_attention(), Footprint() as footprint:
        loss = loss_of(transformer)  # noqa: F841
        return footprint.now


@PATHS
@pytest.mark.parametrize("measure", [saved_bytes, alive_bytes])
def test_outputs_and_logarithms_of_sums_are_all_that_is_kept(measure: Callable[[str, bool], int], fast: bool) -> None:
    config = resolve_base("tiny").config("transformer")
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    joint, second = config["num_layers"], len(config["dual_attention_layers"])
    tokens = joint * (IMAGE + TEXT) + second * IMAGE
    expected = ROWS * heads * tokens * (width + 1) * 4
    assert measure("selective", fast) - measure("block", fast) == pytest.approx(expected, abs=32 * (joint + second))


@pytest.mark.parametrize("kernel", ["flash_attention", "efficient_attention", "cudnn_attention"])
def test_a_gpus_kernels_keep_the_same(kernel: str) -> None:
    """Their schemas, on the meta device: the backward pass finds all of its tensors, and leaves none behind."""
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    needed = {"flash_attention": (), "efficient_attention": (None, True), "cudnn_attention": (None, True)}[kernel]
    shape = (2, 3, 128, 64)
    leaves = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3)]

    def block(*inputs: Tensor) -> tuple[None, Tensor]:
        query, key, value = (tensor * 1 for tensor in inputs)
        return None, kept.attend(lambda *of: operator(*of, *needed)[0], query, key, value).square()

    saved = SavedTensors(leaves)
    with saved.watching():
        _, output = kept.checkpoint_but_attention(block, *leaves)
    rows = 2 * 3 * 128
    assert saved.nbytes == pytest.approx(rows * (64 * 2 + 4), abs=32)
    places = output.grad_fn.places
    assert len(places) >= 3
    output.sum().backward()
    assert all(leaf.grad.shape == shape for leaf in leaves)
    assert not any(held for held, _ in places)

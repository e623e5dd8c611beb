"""One training step: against a plain PyTorch loop, in low precision, with bad gradients, without waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sd3tune.flow.objective import velocity_target
from sd3tune.model.load.components import load_transformer
from sd3tune.model.lora.layers import ADAPTER_NAME, lora_layers
from sd3tune.training.batches import Batch
from sd3tune.training.flat_master import ema_decay
from sd3tune.training.step import predict_velocity

RANK, ALPHA = 2, 3.0


class PlainLoop:
    """The same training as anyone would write it: PEFT's parameters, torch's optimizer and clipping."""

    def __init__(self, training, dtype=torch.float32, lr=1e-3, max_norm=1.0) -> None:
        self.max_norm = max_norm
        self.transformer = load_transformer(training.plan.base, dtype)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(training.plan.modules))
        self.transformer.requires_grad_(False)
        self.transformer.add_adapter(config, adapter_name=ADAPTER_NAME)
        self.parameters: dict[str, nn.Parameter] = {}
        start = training.state.master.named(training.state.master.master)
        for name, layer in lora_layers(self.transformer).items():
            for letter, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
                parameter = self.parameters[f"{name}.lora_{letter}"] = factor[ADAPTER_NAME].weight
                parameter.data = start[f"{name}.lora_{letter}"].to(dtype, copy=True)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4, foreach=False
        )

    def loss(self, batch: Batch) -> Tensor:
        clip_l, clip_g, t5 = (batch.embeddings[encoder] for encoder in ("clip_l", "clip_g", "t5"))
        clip = torch.cat([clip_l["hidden"], clip_g["hidden"]], dim=-1)
        padding = clip.new_zeros(*clip.shape[:2], t5["hidden"].shape[-1] - clip.shape[-1])
        dtype = self.transformer.dtype
        sigma = batch.sigma[:, None, None, None]
        velocity = self.transformer(
            hidden_states=((1 - sigma) * batch.latents + sigma * batch.noise).to(dtype),
            timestep=batch.sigma * 1000,
            encoder_hidden_states=torch.cat([torch.cat([clip, padding], -1), t5["hidden"]], 1).to(dtype),
            pooled_projections=torch.cat([clip_l["pooled"], clip_g["pooled"]], -1).to(dtype),
        ).sample
        return (velocity.float() - (batch.noise - batch.latents)).pow(2).mean()

    def step(self, batches: list[Batch]) -> Tensor:
        for batch in batches:
            (self.loss(batch) / len(batches)).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


@pytest.fixture
def start(assembled, quick_config, tmp_path):
    """`start("key=value", ...)`: a training with an alpha that is not the rank."""

    def make(*overrides: str):
        return assembled(quick_config(tmp_path / "run", f"method.alpha={ALPHA}", *overrides))

    return make


def fp32_copy(weights) -> dict[str, Tensor]:
    return {name: value.detach().float().clone() for name, value in weights.items()}


@pytest.mark.parametrize("max_norm", [0.05, 100.0])
def test_steps_equal_a_plain_pytorch_loop(start, max_norm: float) -> None:
    training = start(
        "train.batch_size=2", "train.gradient_accumulation=2", f"train.max_grad_norm={max_norm}",
        "optimizer.lr=1e-3",
    )  # fmt: skip
    plain = PlainLoop(training, max_norm=max_norm)
    for number in range(5):
        batches = [training.batches.fetch(number, micro) for micro in range(2)]
        expected_norm = plain.step(batches)
        result = training.step()
        torch.testing.assert_close(result.grad_norm, expected_norm, rtol=1e-5, atol=0)
    weights = training.state.master.named(training.state.master.master)
    assert weights.keys() == plain.parameters.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, plain.parameters[name].detach(), rtol=0, atol=2e-6)


def test_four_micro_steps_equal_one_batch_of_four(start) -> None:
    """With squares only: across buckets, a larger batch would hold other images."""
    small = start("train.gradient_accumulation=4", "optimizer.lr=1e-4", "data.buckets=false")
    large = start("train.batch_size=4", "optimizer.lr=1e-4", "data.buckets=false")
    gradients: list[Tensor] = []
    for training in (small, large):
        training.reduce_mean = lambda gradient: (gradients.append(gradient.clone()), gradient)[1]
    for _ in range(3):
        one, other = small.step(), large.step()
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-6, atol=0)
        assert torch.equal(one.sigmas, other.sigmas)
        accumulated, whole = gradients[-2:]
        torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-6 * whole.abs().max().item())
    torch.testing.assert_close(small.state.master.master, large.state.master.master, rtol=0, atol=1e-6)


def test_the_weight_scales_each_samples_loss(start) -> None:
    training = start("train.batch_size=3")
    training.objective = replace(training.objective, weight=lambda sigma: 2 * sigma)
    result = training.step()
    torch.testing.assert_close(result.weighted, 2 * result.sigmas * result.losses)


def test_the_sources_weight_scales_its_samples_losses(start, tiny_images) -> None:
    """Two sources of the same pictures, told apart by name: the unweighted losses stay, what is minimised changes."""
    sources = f"data.sources=[{{path: {tiny_images}, weight: %s}}]"
    plain, weighted = start("train.batch_size=3"), start("train.batch_size=3", sources % 0.25)
    once = plain.step()
    assert torch.equal(once.weighted, once.losses)
    scaled = weighted.step()
    assert torch.equal(scaled.losses, once.losses)
    assert torch.equal(scaled.weighted, 0.25 * once.losses)
    torch.testing.assert_close(scaled.grad_norm, 0.25 * once.grad_norm)


def test_losses_are_those_of_the_velocity(start) -> None:
    training = start("train.batch_size=2")
    batch = training.batches.fetch(0, 0)
    with torch.no_grad():
        velocity = predict_velocity(training.transformer, training.method, batch)
        losses = training.objective.loss(velocity, velocity_target(batch.latents, batch.noise), batch.sigma, 0.0)
        expected = PlainLoop(training).loss(batch)
    assert losses.shape == (2,)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-6, atol=0)


def test_low_precision_keeps_updates_that_low_precision_masters_lose(start) -> None:
    """Steps of 1e-5 on weights of 0.1, where numbers in bf16 lie about 5e-4 apart: most are rounded away."""
    training = start("model.dtype=bf16", "optimizer.lr=1e-5", "train.batch_size=2")
    plain = PlainLoop(training, torch.bfloat16, lr=1e-5)
    ours_before = fp32_copy(training.state.master.named(training.state.master.master))
    plain_before = fp32_copy(plain.parameters)
    for number in range(3):
        plain.step([training.batches.fetch(number, 0)])
        training.step()
    ours = training.state.master.named(training.state.master.master)
    changed = [changed_share(ours_before[name], ours[name]) for name in ours if name.endswith("lora_A")]
    lost = [changed_share(plain_before[name], plain.parameters[name].float()) for name in ours if "lora_A" in name]
    assert min(changed) > 0.95
    assert max(lost) < 0.2
    for name, value in ours.items():
        assert torch.equal(training.parameters[name], value.to(torch.bfloat16))


def changed_share(before: Tensor, after: Tensor) -> float:
    return (before != after).float().mean().item()


def test_no_activation_is_cast_up_by_the_adapters(start) -> None:
    training = start("model.dtype=bf16", "train.batch_size=2")
    inputs: list[torch.dtype] = []
    saved: list[torch.dtype] = []
    inside = False

    def enter(*_) -> None:
        nonlocal inside
        inside = True

    def leave(*_) -> None:
        nonlocal inside
        inside = False

    def note(tensor: Tensor) -> Tensor:
        if inside:
            saved.append(tensor.dtype)
        return tensor

    for layer in lora_layers(training.transformer).values():
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
        for factor in (layer.lora_A, layer.lora_B):
            factor[ADAPTER_NAME].register_forward_pre_hook(lambda _, given: inputs.append(given[0].dtype))

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        predict_velocity(training.transformer, training.method, training.batches.fetch(0, 0))
    assert len(inputs) == 2 * len(training.plan.modules)
    assert len(saved) >= len(inputs)
    assert {*inputs, *saved} == {torch.bfloat16}


def test_gradient_sums_optimizer_and_average_are_fp32_in_a_bf16_run(start) -> None:
    training = start("model.dtype=bf16", "ema={decay: 0.9}")
    training.step()
    state = training.state
    tensors = [state.master.master, state.master.gradient, state.ema]
    tensors += state.optimizer.state[state.master.master].values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(start) -> None:
    training = start()
    training.step()
    state, objective = training.state, training.objective
    before = state.master.master.detach().clone()
    moments = {key: value.clone() for key, value in state.optimizer.state[state.master.master].items()}
    training.objective = replace(objective, weight=lambda sigma: objective.weight(sigma) * float("inf"))
    result = training.step()
    assert not result.grad_norm.isfinite()
    assert state.step == 2
    assert torch.equal(state.master.master, before)
    for key, value in state.optimizer.state[state.master.master].items():
        assert torch.equal(value, moments[key])
    assert torch.equal(state.master.compute, before)

    training.objective = objective
    assert training.step().grad_norm.isfinite()
    assert not torch.equal(state.master.master, before)


def test_fp16_trains_and_halves_its_scale_on_overflow(start) -> None:
    training = start("model.dtype=fp16", "train.batch_size=2")
    state, objective = training.state, training.objective
    before = state.master.master.detach().clone()
    scale = state.loss_scale.scale.item()
    assert scale > 1
    # Beyond fp16's 65504 on the way back.
    training.objective = replace(objective, weight=lambda sigma: objective.weight(sigma) * 1e6)
    assert not training.step().grad_norm.isfinite()
    assert state.loss_scale.scale.item() == scale / 2
    assert torch.equal(state.master.master, before)

    training.objective = objective
    norms = [training.step().grad_norm for _ in range(3)]
    assert all(norm.isfinite() for norm in norms)
    assert state.loss_scale.scale.item() == scale / 2
    assert not torch.equal(state.master.master, before)


def test_fp16s_gradient_is_that_of_fp32(start) -> None:
    half, full = start("model.dtype=fp16"), start()
    torch.testing.assert_close(half.step().grad_norm, full.step().grad_norm, rtol=2e-2, atol=0)


def test_fp16_clips_the_gradient_without_its_scale(start) -> None:
    """AdamW's first moment holds a tenth of the first gradient that it is given."""
    limit = 1e-3
    training = start("model.dtype=fp16", f"train.max_grad_norm={limit}")
    result = training.step()
    assert limit < result.grad_norm.item() < training.state.loss_scale.scale.item()
    moment = training.state.optimizer.state[training.state.master.master]["exp_avg"]
    assert 10 * moment.norm().item() == pytest.approx(limit, rel=1e-4)


def test_fp16_keeps_updates_that_fp16_masters_lose(start) -> None:
    """Steps of 1e-6 on weights of 0.1, where numbers in fp16 lie 6e-5 apart."""
    training = start("model.dtype=fp16", "optimizer.lr=1e-6", "train.batch_size=2")
    before = fp32_copy(training.state.master.named(training.state.master.master))
    rounded = fp32_copy(training.parameters)
    for _ in range(3):
        assert training.step().grad_norm.isfinite()
    after = training.state.master.named(training.state.master.master)
    names = [name for name in after if name.endswith("lora_A")]
    assert min(changed_share(before[name], after[name]) for name in names) > 0.95
    assert max(changed_share(rounded[name], training.parameters[name].float()) for name in names) < 0.2


def test_the_average_follows_its_recursion(start) -> None:
    training = start("ema={decay: 0.5}", "optimizer.lr=1e-1")
    expected = training.state.master.master.detach().double()
    for number in range(1, 9):
        training.step()
        decay = min(0.5, (1 + number) / (10 + number))
        assert ema_decay(training.config.ema, number) == decay
        expected = decay * expected + (1 - decay) * training.state.master.master.detach().double()
    torch.testing.assert_close(training.state.ema.double(), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(training.state.ema, training.state.master.master)


class _NoHostSync(TorchDispatchMode):
    """Raises where a value would be read back: `.item()`, `float(tensor)`, `if tensor:`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [("fp32", "adamw"), ("fp16", "adamw"), ("fp32", "adamw8bit"), ("fp32", "prodigy"), ("fp32", "lion")],
)
def test_a_step_reads_no_value_back(start, dtype: str, optimizer: str) -> None:
    training = start(
        f"model.dtype={dtype}", f"optimizer={{kind: {optimizer}}}", "ema={decay: 0.9}",
        "train.gradient_accumulation=2", "method.dropout=0.1",
    )  # fmt: skip
    training.step()
    with _NoHostSync():
        result = training.step()
    assert all(isinstance(value, Tensor) for value in (result.losses, result.weighted, result.sigmas))
    assert isinstance(result.grad_norm, Tensor)


def test_the_guard_against_host_syncs_works() -> None:
    with _NoHostSync(), pytest.raises(AssertionError, match="wait"):
        torch.ones(()).item()


def test_block_checkpointing_changes_no_gradient(start) -> None:
    plain, checkpointed = start("train.batch_size=2"), start("train.batch_size=2")
    checkpointed.transformer.enable_gradient_checkpointing()
    recomputed = count_forwards(checkpointed.transformer)
    usual = count_forwards(plain.transformer)
    for _ in range(2):
        plain.step()
        checkpointed.step()
    assert len(recomputed) == 2 * len(usual)
    assert torch.equal(plain.state.master.master, checkpointed.state.master.master)


def test_block_checkpointing_drops_the_same_inputs_again(start) -> None:
    settings = ("method.dropout=0.3", "train.batch_size=2", "train.gradient_accumulation=2")
    plain, checkpointed, without = start(*settings), start(*settings), start(*settings[1:])
    checkpointed.transformer.enable_gradient_checkpointing()
    for _ in range(2):
        for training in (plain, checkpointed, without):
            training.step()
    assert torch.equal(plain.state.master.master, checkpointed.state.master.master)
    assert not torch.equal(plain.state.master.master, without.state.master.master)


def test_every_micro_step_and_rank_drops_other_inputs(start) -> None:
    training = start("method.dropout=0.3", "train.gradient_accumulation=2")
    seeds = []
    regularised = training.method.regularised
    training.method.regularised = lambda transformer, seed: (seeds.append(seed), regularised(transformer, seed))[1]
    training.step()
    training.step()
    training.batches.rank, training.batches.world = 1, 2
    training.step()
    assert len(set(seeds)) == len(seeds) == 6


def test_huber_is_minimised_when_asked_for(start) -> None:
    squared, huber = start(), start("flow.loss={kind: huber, delta: 100.0}")
    torch.testing.assert_close(huber.step().losses, squared.step().losses / 2)


def count_forwards(transformer: SD3Transformer2DModel) -> list[None]:
    """A list that grows by one whenever the first block's attention runs."""
    calls: list[None] = []
    transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: calls.append(None))
    return calls


def test_a_perturbed_input_keeps_its_target(start) -> None:
    """Ning et al. 2023: the model sees more noise than the target says."""
    training = start("flow.input_perturbation=0.3")
    batch = training.batches.fetch(0, 0)
    assert torch.equal(velocity_target(batch.latents, batch.noise), batch.noise - batch.latents)
    seen: list[Tensor] = []
    hook = training.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    training.step()
    hook.remove()
    sigma = batch.sigma[:, None, None, None]
    torch.testing.assert_close(seen[0], (1 - sigma) * batch.latents + sigma * batch.input_noise)
    assert not torch.allclose(batch.input_noise, batch.noise)

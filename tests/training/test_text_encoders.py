"""Trained text encoders: against the store, against diffusers' script, and each with its own rate and clipping."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from sd3tune.commands.plan import gigabytes
from sd3tune.config import load_config
from sd3tune.data.sampler import generator
from sd3tune.errors import ConfigError
from sd3tune.forecast.footprint import bytes_of, peak_of, tensors_of
from sd3tune.forecast.forecast import forecast_inputs
from sd3tune.forecast.rehearsal import rehearse_training
from sd3tune.methods import METHODS
from sd3tune.methods.stored_text import StoredText
from sd3tune.model.compute.fast import use_fast_path
from sd3tune.model.compute.hoist import hoisted
from sd3tune.model.load.components import load_transformer
from sd3tune.model.load.text import TOKENS
from sd3tune.run.batches import make_batches
from sd3tune.run.describe import describe
from sd3tune.run.preflight import make_plan
from sd3tune.run.setup import load_base
from sd3tune.runtime.processes import Processes
from sd3tune.training.ahead import with_modulations
from sd3tune.training.batches import Batch
from sd3tune.training.step import predict_velocity, velocity_targets

ROOT = Path(__file__).parents[2]
LEARNING = "method.text_encoders={clip_l: {rank: 4, alpha: 8.0, lr: 0.002}, clip_g: {rank: 2, alpha: 2.0, lr: 0.03}}"
PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


@pytest.fixture
def start(assembled, quick_config, tmp_path):
    """`start("key=value", ...)`: a training of both encoders; with `learned`, no B is zero."""

    def make(*overrides: str, learned: bool = False):
        training = assembled(quick_config(tmp_path / "run", LEARNING, *overrides))
        if learned:
            for name, value in training.state.master.named(training.state.master.master).items():
                if name.endswith("lora_B"):
                    value.normal_(0, 0.1, generator=generator(2, name))
            training.state.master.publish()
        return training

    return make


def stored(training, embeddings) -> tuple[Tensor, Tensor]:
    return StoredText.conditioning(training.method, embeddings, training.transformer)


def equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_with_zero_adapters_the_conditioning_is_the_stores_to_the_bit(start, dtype: str) -> None:
    training = start(
        "train.batch_size=3", "data.encoder_dropout=0.4", "data.caption_dropout=0.3", f"model.dtype={dtype}"
    )
    dropped = 0
    for step in range(6):
        embeddings = training.batches.fetch(step, 0).embeddings
        assert equal(training.method.conditioning(embeddings, training.transformer), stored(training, embeddings))
        dropped += sum(int((~embeddings[name][TOKENS].any(dim=1)).sum()) for name in PARTS)
    assert dropped  # a dropped encoder is zeros, as from the store


def test_in_fp16_every_segment_is_scaled_and_learns(start) -> None:
    training = start("model.dtype=fp16")
    before = training.state.master.master.detach().clone()
    assert training.step().grad_norm.isfinite()
    assert training.state.loss_scale.scale > 1
    change = training.state.master.named(training.state.master.master.detach() - before)
    for segment, lr in (("transformer_blocks", 0.01), ("text_encoder.", 0.002), ("text_encoder_2.", 0.03)):
        of_up = [
            value.abs().max().item() for name, value in change.items() if name.startswith(segment) and "_B" in name
        ]
        assert max(of_up) == pytest.approx(lr, rel=0.01)  # Adam's first step


def test_learned_encoders_condition_otherwise_and_the_base_still_reads_the_store(start) -> None:
    training = start("train.batch_size=2", learned=True)
    embeddings = training.batches.fetch(0, 0).embeddings
    weights = training.state.master.named(training.state.master.master)
    live = training.method.conditioning(embeddings, training.transformer)
    assert not any(torch.equal(*pair) for pair in zip(live, stored(training, embeddings), strict=True))
    assert live[1].requires_grad
    with training.method.disabled(training.transformer):
        assert equal(training.method.conditioning(embeddings, training.transformer), stored(training, embeddings))
    with training.method.as_exported(training.transformer, weights):
        exported = training.method.conditioning(embeddings, training.transformer)
    assert not exported[1].requires_grad
    torch.testing.assert_close(exported, tuple(tensor.detach() for tensor in live), rtol=0, atol=1e-5)
    assert equal(training.method.conditioning(embeddings, training.transformer), live)


def test_each_distinct_caption_of_a_micro_batch_is_encoded_once(start, write_images, tmp_path, monkeypatch) -> None:
    pictures = write_images(tmp_path / "pictures", 3)
    for file in pictures.glob("*.txt"):
        file.unlink()
    same = start("train.batch_size=3", f"data.sources=[{{path: {pictures}, caption: a dog}}]", "data.buckets=false")
    other = start("train.batch_size=3", "data.buckets=false")
    for training, expected in ((same, 1), (other, 3)):
        encoder, calls = training.method.text.live["clip_l"], []
        compute = encoder.compute
        monkeypatch.setattr(encoder, "compute", lambda ids, do=compute, seen=calls: (seen.append(ids), do(ids))[1])
        predict_velocity(training.transformer, training.method, training.batches.fetch(0, 0))
        assert [ids.shape for ids in calls] == [(1, 77)] * expected


def test_the_bases_prediction_is_of_the_stores_text(start, tiny_images) -> None:
    prior = "{path: %s, caption: a photo of sks dog, prior: {kind: prediction, prompt: a photo of a dog}}"
    training = start(f"data.sources=[{prior % tiny_images}]", learned=True)
    batch = training.batches.fetch(0, 0)
    assert batch.kept == slice(1, 2)
    embeds, pooled = stored(training, batch.rows(batch.kept).embeddings)
    base = load_transformer(training.plan.base, torch.float32)
    sigma = batch.sigma[1:, None, None, None]
    expected = base(
        hidden_states=(1 - sigma) * batch.latents[1:] + sigma * batch.noise[1:],
        timestep=1000 * batch.sigma[1:],
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
    ).sample
    assert torch.equal(velocity_targets(training.transformer, training.method, batch)[1:], expected)


class Script:
    """The loss of diffusers' `train_dreambooth_lora_sd3.py --train_text_encoder`, with transformers' encoders and PEFT.

    `encode_prompt` tokenises, takes the penultimate hidden states and the projected vector of each CLIP, pads the two
    CLIPs' concatenation to T5's width, and puts T5 behind it.
    """

    def __init__(self, training) -> None:
        base, weights = training.plan.base, training.state.master.named(training.state.master.master)
        folders = {part: base.path / part for part in ("text_encoder", "text_encoder_2", "text_encoder_3")}
        self.encoders = [CLIPTextModelWithProjection.from_pretrained(folders[part]) for part in PARTS.values()]
        self.tokenizers = [CLIPTokenizer.from_pretrained(base.path / part) for part in ("tokenizer", "tokenizer_2")]
        self.t5 = T5EncoderModel.from_pretrained(folders["text_encoder_3"])
        self.t5_tokenizer = T5TokenizerFast.from_pretrained(base.path / "tokenizer_3")
        self.transformer = load_transformer(base, torch.float32)
        self.factors: dict[str, nn.Parameter] = {}
        layers = [module for module in training.plan.modules if module.startswith("transformer_blocks")]
        self._adapt("", self.transformer, 2, 2.0, layers, weights)
        targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
        for part, encoder, rank, alpha in zip(PARTS.values(), self.encoders, (4, 2), (8.0, 2.0), strict=True):
            self._adapt(f"{part}.", encoder, rank, alpha, targets, weights)

    def _adapt(self, prefix: str, model, rank: int, alpha: float, targets, weights: Mapping[str, Tensor]) -> None:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), adapter_name="default")
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                for letter, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
                    key = f"{prefix}{name}.lora_{letter}"
                    self.factors[key] = factor["default"].weight
                    factor["default"].weight.data = weights[key].clone()

    def encode_prompt(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        hidden, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            output = encoder(ids, output_hidden_states=True)
            pooled.append(output[0])
            hidden.append(output.hidden_states[-2])
        ids = self.t5_tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        t5 = self.t5(ids)[0].detach()
        clip = torch.cat(hidden, dim=-1)
        clip = nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([clip, t5], dim=-2), torch.cat(pooled, dim=-1)

    def loss(self, batch: Batch, prompts: list[str]) -> Tensor:
        sigmas = batch.sigma[:, None, None, None]
        embeds, pooled = self.encode_prompt(prompts, batch.embeddings["t5"]["hidden"].shape[1])
        prediction = self.transformer(
            hidden_states=(1.0 - sigmas) * batch.latents + sigmas * batch.noise,
            timestep=1000 * batch.sigma,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        target = batch.noise - batch.latents
        return ((prediction - target) ** 2).reshape(target.shape[0], -1).mean(1).mean()


@pytest.mark.parametrize("path", ["plain", "fast", "fast, recomputed"])
def test_gradients_are_those_of_the_script(start, path: str) -> None:
    training = start("train.batch_size=3", "data.buckets=false", learned=True)
    script = Script(training)
    batch = training.batches.fetch(0, 0)
    captions = {record.image.name: record.caption for record in training.plan.records}
    script.loss(batch, [captions[name] for name in batch.names]).backward()
    if path != "plain":
        use_fast_path(training.transformer)
    if path == "fast, recomputed":
        training.transformer.enable_gradient_checkpointing()
    velocity = predict_velocity(training.transformer, training.method, batch)
    training.objective.loss(velocity, batch.noise - batch.latents, batch.sigma, 0.0).mean().backward()
    assert training.parameters.keys() == script.factors.keys()
    for prefix in ("text_encoder.", "text_encoder_2.", "transformer_blocks."):
        names = [name for name in training.parameters if name.startswith(prefix)]
        ours, theirs = (
            torch.cat([of[name].grad.flatten() for name in names]).double()
            for of in (training.parameters, script.factors)
        )
        assert (1 - torch.cosine_similarity(ours, theirs, dim=0)).abs() < 1e-9
        assert ours.norm() == pytest.approx(theirs.norm().item(), rel=1e-5)


@pytest.mark.parametrize("max_norm", [0.02, 100.0])
def test_each_encoder_has_its_own_rate_and_is_clipped_by_itself(start, max_norm: float) -> None:
    training = start(f"train.max_grad_norm={max_norm}", "optimizer.lr=0.001", learned=True)
    rates = {"transformer_blocks.": 0.001, "text_encoder.": 0.002, "text_encoder_2.": 0.03}
    named = training.state.master.named(training.state.master.master)
    plain = {
        prefix: {name: value.clone().requires_grad_() for name, value in named.items() if name.startswith(prefix)}
        for prefix in rates
    }
    optimizer = torch.optim.AdamW(
        [{"params": list(plain[prefix].values()), "lr": lr} for prefix, lr in rates.items()], weight_decay=1e-4
    )
    for step in range(3):
        batch = training.batches.fetch(step, 0)
        velocity = predict_velocity(training.transformer, training.method, batch)
        training.objective.loss(velocity, batch.noise - batch.latents, batch.sigma, 0.0).mean().backward()
        norms = []
        for own in plain.values():
            for name, value in own.items():
                value.grad, training.parameters[name].grad = training.parameters[name].grad.clone(), None
            norms.append(nn.utils.clip_grad_norm_(own.values(), max_norm).item())
        optimizer.step()
        assert training.step().grad_norm.item() == pytest.approx(math.hypot(*norms), rel=1e-5)
    for name, value in (item for own in plain.values() for item in own.items()):
        torch.testing.assert_close(named[name], value.detach(), rtol=0, atol=2e-6)


def test_a_gradient_that_is_not_finite_anywhere_skips_all_updates(start) -> None:
    training = start("optimizer.kind=adamw8bit", learned=True)
    before = training.state.master.master.detach().clone()
    place = training.state.master.clipped_parts[2].start
    training.reduce_mean = lambda gradient: gradient.index_fill_(0, torch.tensor(place), math.nan)
    assert not training.step().grad_norm.isfinite()
    assert torch.equal(training.state.master.master, before)


def test_two_processes_have_the_gradient_of_one(start) -> None:
    """Each rank encodes its own captions; the mean of their gradients is the whole batch's."""
    training = start("train.batch_size=2", "data.buckets=false", learned=True)
    half = training.config.model_copy(update={"train": training.config.train.model_copy(update={"batch_size": 1})})
    plan, gradients = training.plan, []

    def gradient_of(batch: Batch) -> Tensor:
        velocity = predict_velocity(training.transformer, training.method, batch)
        training.objective.loss(velocity, batch.noise - batch.latents, batch.sigma, 0.0).mean().backward()
        training.state.master.collect_gradients()
        gradient, _ = training.state.master.gradient.clone(), training.state.master.gradient.zero_()
        return gradient

    for rank in range(2):
        processes = Processes(rank, 2, lambda tensor: tensor, lambda tensor: tensor[None], lambda: None)
        batches = make_batches(replace(plan, config=half), training.encoded, processes)
        gradients.append(gradient_of(batches.fetch(0, 0)))
        batches.close()
    whole = gradient_of(training.batches.fetch(0, 0))
    # Sums in another order differ by some 1e-6 of the largest value in fp32, how much depends on the machine.
    torch.testing.assert_close((gradients[0] + gradients[1]) / 2, whole, rtol=0, atol=5e-6 * whole.abs().max().item())


def test_adaln_is_not_computed_ahead_and_the_run_says_so(start, quick_config, tmp_path) -> None:
    training = start()
    assert training.config.train.hoist
    assert not hoisted(load_base(training.plan))
    assert with_modulations(training.batches, training.transformer, training.method) is training.batches
    note = "note: train.hoist has no effect: trained text encoders change the pooled text"
    assert [line for line in describe(training.plan, 1) if line.startswith(note)]
    plain = make_plan(quick_config(tmp_path / "plain"), torch.device("cpu"), resume=False)
    assert hoisted(load_base(plain))
    assert not [line for line in describe(plain, 1) if "train.hoist" in line]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_counts_encoders_activations_and_parameters(start, dtype: torch.dtype) -> None:
    """As a real step counts them, within a twentieth."""
    training = start("train.batch_size=2", "data.buckets=false", "train.fast_path=false")
    config, base = training.config, training.plan.base
    found = rehearse_training(config, base, METHODS["lora"](config, base), (64, 64), dtype)
    models = training.method.companions()
    frozen = sum(bytes_of([t for t in tensors_of(model) if not t.requires_grad]) for model in models)
    assert found.trained == len(training.state.master.master) == sum(row.parameters for row in training.plan.coverage)
    indices = sum(bytes_of([t for t in tensors_of(model) if not t.is_floating_point()]) for model in models)
    assert found.encoders == (frozen - indices) * dtype.itemsize // 4 + indices
    if dtype is torch.float32:
        assert found.working == pytest.approx(peak_of(training.step).peak, rel=0.05)


@pytest.mark.long
def test_the_page_says_what_a_full_size_base_takes() -> None:
    page = (ROOT / "docs" / "text-encoders.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE))
    overrides = ["method.text_encoders={clip_l: {}, clip_g: {}}"]
    config = load_config(ROOT / "configs" / "dreambooth_sd35_medium.yaml", overrides).config
    inputs = forecast_inputs(config, torch.bfloat16)
    method = METHODS["lora"](inputs.config, inputs.base)
    found = rehearse_training(inputs.config, inputs.base, method, inputs.largest, torch.bfloat16)
    assert rows["training, resident"] == gigabytes(found.resident)
    assert rows["training, peak"] == gigabytes(found.peak)
    assert rows["operations of a step, TFLOP"] == f"{found.flops / 1e12:.1f}"
    assert found.encoders == pytest.approx(1.64e9, rel=0.01)  # 123.7 and 694.7 million parameters


def test_what_does_not_go_together_is_refused_in_a_line(quick_config, tmp_path) -> None:
    for overrides, says in (
        (["method.text_encoders={}"], "names no encoder to train"),
        (["method.text_encoders={t5: {}}"], "t5: unknown key"),
        ([LEARNING, "train.fused_backward=true", "train.max_grad_norm=null"], "learning rates of their own"),
        ([LEARNING, "optimizer.kind=schedulefree"], "rates of their own"),
    ):
        with pytest.raises(ConfigError) as caught:
            quick_config(tmp_path, *overrides)
        (line,) = caught.value.problems
        assert says in line


def test_the_default_trains_no_encoder(quick_config, tmp_path, assembled) -> None:
    training = assembled(quick_config(tmp_path / "run"))
    assert training.method.trained_encoders == ()
    assert len(training.state.master.clipped_parts) == 1
    assert training.state.master.rates is None
    assert training.state.optimizer.param_groups[0]["params"] == [training.state.master.master]
    assert TOKENS not in training.batches.fetch(0, 0).embeddings["clip_l"]

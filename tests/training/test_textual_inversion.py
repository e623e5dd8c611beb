"""Learned tokens in single steps: against transformers' own tables, and beside everything that stays frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sd3tune.data.sampler import generator
from sd3tune.forecast.footprint import bytes_of, peak_of, tensors_of
from sd3tune.forecast.rehearsal import rehearse_training
from sd3tune.methods import METHODS
from sd3tune.methods.stored_text import StoredText
from sd3tune.model.load.components import load_text_encoder
from sd3tune.training.step import predict_velocity

METHOD = "method={kind: textual_inversion, token: <rex>, vectors: 2, init: a dog, t5_caption: dog}"
PARTS = {"clip_l": "text_encoder.tokens", "clip_g": "text_encoder_2.tokens"}


@pytest.fixture
def start(assembled, quick_config, write_images, tmp_path):
    def make(*overrides: str):
        folder = write_images(tmp_path / "pictures", 3)
        for number, file in enumerate(sorted(folder.glob("*.txt"))):
            file.write_text(f"a photo of <rex>, number {number}")
        return assembled(quick_config(tmp_path / "run", METHOD, f"data.sources=[{{path: {folder}}}]", *overrides))

    return make


def reference(training, name: str, parameter: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The penultimate hidden states and the pooled vectors by transformers' encoder with a longer table."""
    encoder = load_text_encoder(training.plan.base, name, torch.float32)
    model, tokenizer = encoder.model, encoder.tokenizer
    assert tokenizer.add_tokens(["<rex>", "<rex>_1"]) == 2
    table = model.get_input_embeddings().weight
    rows = nn.functional.normalize(parameter, dim=1) * table.norm(dim=1).mean()
    model.text_model.eos_token_id = tokenizer.eos_token_id
    written = [text.replace("<rex>", "<rex> <rex>_1") for text in texts]
    ids = tokenizer(written, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    weights = {"text_model.embeddings.token_embedding.weight": torch.cat([table, rows])}
    model.get_input_embeddings().num_embeddings += 2
    output = functional_call(model, weights, (ids,), {"output_hidden_states": True})
    return output.hidden_states[-2], output[0]


@pytest.mark.parametrize("learned", [False, True])
def test_conditioning_and_gradients_are_those_of_a_longer_table(start, learned: bool) -> None:
    training = start("train.batch_size=3", "data.buckets=false")
    weights = training.state.master.named(training.state.master.master)
    if learned:
        for name, value in weights.items():
            value.normal_(0, 0.5, generator=generator(1, name))
    batch = training.batches.fetch(0, 0)
    captions = {record.image.name: record.caption for record in training.plan.records}
    parameters = {name: weights[PARTS[name]].clone().requires_grad_() for name in PARTS}
    texts = [captions[name] for name in batch.names]
    found = {name: reference(training, name, parameters[name], texts) for name in PARTS}
    encoded = {name: {"hidden": hidden, "pooled": pooled} for name, (hidden, pooled) in found.items()}
    expected = StoredText.conditioning(training.method, {**batch.embeddings, **encoded}, training.transformer)
    live = training.method.conditioning(batch.embeddings, training.transformer)
    for one, other in zip(live, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    pull = [torch.randn(one.shape, generator=generator(2, number)) for number, one in enumerate(live)]
    for pair in (live, expected):
        sum((one * by).sum() for one, by in zip(pair, pull, strict=True)).backward()
    for name in PARTS:
        ours, theirs = training.parameters[PARTS[name]].grad.flatten(), parameters[name].grad.flatten()
        assert (1 - torch.cosine_similarity(ours.double(), theirs.double(), dim=0)).abs() < 1e-8
        assert ours.norm() == pytest.approx(theirs.norm().item(), rel=1e-4)


def test_only_the_vectors_have_gradients_and_the_base_reads_the_class_words(start) -> None:
    training = start()
    batch = training.batches.fetch(0, 0)
    predict_velocity(training.transformer, training.method, batch).square().sum().backward()
    models = [training.transformer, *training.method.companions()]
    assert not [name for model in models for name, value in model.named_parameters() if value.grad is not None]
    assert all(parameter.grad.any() for parameter in training.parameters.values())
    stored = StoredText.conditioning(training.method, batch.embeddings, training.transformer)
    with training.method.disabled(training.transformer):
        base = training.method.conditioning(batch.embeddings, training.transformer)
    assert all(torch.equal(*pair) for pair in zip(base, stored, strict=True))
    dog = training.encoded.captions["t5"]["a photo of <rex>, number 0"]
    assert training.method.stored_text("a photo of <rex>, number 0") == "a photo of dog, number 0"
    assert dog in {example.captions["t5"] for example in training.encoded.examples}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_learns(start, dtype: str) -> None:
    training = start(f"model.dtype={dtype}")
    before = training.state.master.master.detach().clone()
    assert training.step().grad_norm.isfinite()
    assert (training.state.master.master - before).abs().min() > 0


def test_the_plan_counts_it(start) -> None:
    training = start("train.batch_size=2", "data.buckets=false", "train.fast_path=false")
    config, base = training.config, training.plan.base
    found = rehearse_training(config, base, METHODS["textual_inversion"](config, base), (64, 64), torch.float32)
    frozen = sum(bytes_of(tensors_of(model)) for model in training.method.companions())
    assert found.trained == 2 * (16 + 32)
    assert found.encoders == frozen
    assert found.working == pytest.approx(peak_of(training.step).peak, rel=0.05)

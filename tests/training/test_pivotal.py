"""Pivotal tuning in single steps: the token's gradients end with its training, and the plan counts all of it."""

from __future__ import annotations

import pytest
import torch

from sd3tune.forecast.footprint import bytes_of, peak_of, tensors_of
from sd3tune.forecast.rehearsal import rehearse_training
from sd3tune.methods import METHODS

TOKEN = "method.embedding={token: <rex>, vectors: 2, init: a dog, t5_caption: dog}"
NAMES = ("text_encoder.tokens", "text_encoder_2.tokens")


@pytest.fixture
def start(assembled, quick_config, write_images, tmp_path):
    def make(*overrides: str):
        folder = write_images(tmp_path / "pictures", 3)
        for number, file in enumerate(sorted(folder.glob("*.txt"))):
            file.write_text(f"a photo of <rex>, number {number}")
        source = f"data.sources=[{{path: {folder}}}]"
        return assembled(quick_config(tmp_path / "run", "method={kind: pivotal, rank: 2}", TOKEN, source, *overrides))

    return make


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_frozen_token_keeps_its_bits_and_computes_no_gradient(start, dtype: str) -> None:
    training = start(f"model.dtype={dtype}", "train.steps=3", "method.embedding.until=0.3")
    values = training.state.master.named(training.state.master.master)
    first = {name: value.clone() for name, value in values.items()}
    training.step()
    moved = {name: value.clone() for name, value in values.items()}
    assert all(not torch.equal(moved[name], first[name]) for name in NAMES)
    training.step()
    for name, value in values.items():
        assert torch.equal(value, moved[name]) == (name in NAMES)
        assert training.parameters[name].requires_grad == (name not in NAMES)
    gradients = training.state.master.named(training.state.master.gradient)
    assert not any(gradients[name].any() for name in NAMES)


def test_the_plan_counts_it(start) -> None:
    training = start("train.batch_size=2", "data.buckets=false", "train.fast_path=false")
    config, base = training.config, training.plan.base
    found = rehearse_training(config, base, METHODS["pivotal"](config, base), (64, 64), torch.float32)
    frozen = sum(bytes_of(tensors_of(model)) for model in training.method.companions())
    assert found.trained == training.state.master.master.numel()
    assert found.encoders == frozen
    assert found.working == pytest.approx(peak_of(training.step).peak, rel=0.05)

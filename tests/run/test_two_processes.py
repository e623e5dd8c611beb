"""Two processes train what one trains, for the methods that tests/methods/test_matrix.py does not have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd3tune.commands.train import run_training
from sd3tune.config import dump_config

METHODS = {
    "text encoders": (
        "method={kind: lora, rank: 2, text_encoders: {clip_l: {rank: 2, lr: 0.01}, clip_g: {rank: 2, lr: 0.01}}}",
        "adapter/pytorch_lora_weights.safetensors",
    ),
    "dora with text encoders": (
        "method={kind: dora, rank: 2, text_encoders: {clip_l: {rank: 2, lr: 0.01}}}",
        "adapter/pytorch_lora_weights.safetensors",
    ),
    "textual inversion": (
        "method={kind: textual_inversion, token: sks, vectors: 2, init: a dog, t5_caption: dog}",
        "embedding/learned_embeds.safetensors",
    ),
    "full": ("method={kind: full, export_dtype: fp32}", "model/transformer/diffusion_pytorch_model.safetensors"),
}
OPTIONS = ("train.steps=2", "optimizer={kind: adamw, lr: 0.001}", "ema={decay: 0.5}")


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_what_one_trains(quick_config, tmp_path: Path, start_cli, name: str) -> None:
    method, product = METHODS[name]
    run_training(quick_config(tmp_path / "one", method, *OPTIONS, "train.batch_size=2"))
    (tmp_path / "two.yaml").write_text(dump_config(quick_config(tmp_path / "two", method, *OPTIONS)))
    process = start_cli("train", tmp_path / "two.yaml", "--num-processes", "2")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert json.loads((tmp_path / "two" / "run.json").read_text())["world_size"] == 2
    one, two = load_file(tmp_path / "one" / product), load_file(tmp_path / "two" / product)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-4)

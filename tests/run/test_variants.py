"""Every preset of targets and every variant of the flow trains, and its adapter loads in a plain pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.train import run_training
from sd3tune.config.schema import Config
from sd3tune.errors import UserError
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_pipeline
from sd3tune.model.lora.layers import lora_layers

PRESETS = ("attention", "attention-image", "attention+mlp")


def train(config: Config) -> list[str]:
    """Run it, and load its adapter as anyone would: the modules that carry it."""
    run_training(config)
    folder = Path(str(config.output_dir)) / "adapter"
    pipeline = load_pipeline(resolve_base(config.model.base), torch.float32)
    pipeline.load_lora_weights(folder)
    stored, layers = load_file(folder / "pytorch_lora_weights.safetensors"), lora_layers(pipeline.transformer)
    assert len(stored) == 2 * len(layers)
    for name, layer in layers.items():
        for letter, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
            assert torch.equal(factor["default_0"].weight, stored[f"transformer.{name}.lora_{letter}.weight"])
            assert factor["default_0"].weight.any(), f"{name} has learned nothing"
        assert layer.scaling["default_0"] == 1.0
    return list(layers)


@pytest.mark.parametrize("base", ["tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_of_targets_trains_and_reloads(quick_config, tmp_path: Path, capsys, base, preset) -> None:
    run = tmp_path / "run"
    modules = train(quick_config(run, f"model.base={base}", f"method.targets={preset}", "train.steps=2"))
    printed = capsys.readouterr().out
    assert f"in {len(modules)} modules" in printed
    assert ("ff_context.net.2" in printed) == (preset == "attention+mlp")
    assert ("add_k_proj" in printed) == (preset != "attention-image")


VARIANTS = {
    "expression": ("method.targets='re:transformer_blocks\\.\\d\\.ff\\.net\\..*'", "method.blocks=[1, 2-3]"),
    "patterns": ("method.rank_pattern={attn.to_k: 1, 're:.*\\.0\\..*': 6}", "method.alpha_pattern={attn2.to_q: 9.0}"),
    "rslora": ("method.rslora=true", "method.rank=3"),
    "dropout": ("method.dropout=0.3",),
    "gaussian": ("method.init=gaussian",),
    "orthogonal": ("method.init=orthogonal",),
    "eva": ("method.init=eva",),
    "mode": ("flow.timesteps={kind: mode, scale: 1.29}", "flow.weighting.kind=cosmap"),
    "cosmap": ("flow.timesteps.kind=cosmap", "flow.weighting.kind=min_snr", "flow.shift=resolution"),
    "sigma_sqrt": ("flow.weighting.kind=sigma_sqrt", "flow.min_sigma=0.3", "flow.max_sigma=0.9"),
    "perturbed": ("flow.input_perturbation=0.1",),
    "absolute": ("flow.loss.kind=absolute", "flow.timesteps={kind: beta, alpha: 1.5, beta: 3.0}"),
    "pseudo_huber": (
        "flow.loss={kind: pseudo_huber, delta: 2.0, last_delta: 0.1, over: steps}",
        "flow.timesteps={kind: mixture, shares: [1.0, 3.0]}",
        "flow.max_sigma=0.9",
    ),
    "huber": ("flow.loss={kind: huber, delta: 0.5}", "flow.noise_offset=0.05"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_reloads(quick_config, tmp_path: Path, lines_of, name: str) -> None:
    train(quick_config(tmp_path / "run", *VARIANTS[name], "train.steps=2"))
    losses = [line["loss"] for line in lines_of(tmp_path / "run")]
    assert all(0 < loss < 1e4 for loss in losses)


def test_eva_starts_from_the_data_and_leaves_the_base_alone(quick_config, tmp_path: Path, adapter_of, lines_of) -> None:
    """The first loss is the base's; A's rows are orthonormal, as drawn ones are not."""
    run_training(quick_config(tmp_path / "eva", "method.init=eva", "train.steps=1", "optimizer.lr=1e-9"))
    run_training(quick_config(tmp_path / "plain", "train.steps=1", "optimizer.lr=1e-9"))
    assert lines_of(tmp_path / "eva")[0]["loss"] == lines_of(tmp_path / "plain")[0]["loss"]
    for key, factor in adapter_of(tmp_path / "eva").items():
        if "lora_A" in key:
            torch.testing.assert_close(factor @ factor.T, torch.eye(2), rtol=0, atol=1e-4)


def test_going_on_from_an_adapter_begins_where_it_ended(quick_config, tmp_path: Path, lines_of) -> None:
    """With the samples of the first run's next step, the first loss is what that step would have had."""
    run_training(quick_config(tmp_path / "long", "train.steps=4", "method.alpha=5.0"))
    run_training(quick_config(tmp_path / "first", "train.steps=3", "method.alpha=5.0"))
    second = quick_config(
        tmp_path / "second", "train.steps=4", "method.alpha=3.0", f"method.start_from={tmp_path / 'first'}",
        "optimizer.lr=1e-12",
    )  # fmt: skip
    run_training(second)
    last = [lines_of(tmp_path / run)[-1]["loss"] for run in ("long", "second")]
    assert last[1] == pytest.approx(last[0], rel=1e-5)
    contract = read_adapter(tmp_path / "second").contract
    assert len(contract["start_from"]) == 64
    assert "start_from" not in read_adapter(tmp_path / "first").contract


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("method.blocks=[0-11]", "method.blocks: 11 is out of range; this base has 4 blocks, 0 to 3"),
        ("method.targets=re:attn", "method.targets: 're:attn' matches no linear module"),
        ("method.rank_pattern={to_z: 4}", "method.rank_pattern: 'to_z' matches none of the trained modules"),
        ("method.start_from=/nothing/here", "method.start_from: /nothing/here: no such file or folder"),
    ],
)
def test_what_the_base_does_not_have_is_said_before_anything_is_written(
    quick_config, tmp_path: Path, override: str, line: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_training(quick_config(tmp_path / "run", override))
    assert [problem.startswith(line) for problem in caught.value.problems] == [True]
    assert not (tmp_path / "run").exists()

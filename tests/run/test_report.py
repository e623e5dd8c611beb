"""The closing report says whether the adapter learned anything, and what to type next."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.train import run_training
from sd3tune.data.sampler import generator
from sd3tune.errors import RunError
from sd3tune.model.load.components import load_transformer
from sd3tune.model.lora.layers import block_norms
from sd3tune.run.batches import make_batches
from sd3tune.run.encoding import encode
from sd3tune.run.preflight import Plan, make_plan
from sd3tune.run.report import (
    FIXED_SIGMAS,
    closing_report,
    describe_learning,
    describe_next,
    describe_product,
    infer_command,
)
from sd3tune.runtime.processes import ALONE
from sd3tune.training.batches import Batch, Batches

RANK, ALPHA = 2, 3.0


def summary(plan: Plan, report: dict) -> list[str]:
    """What a run prints at its end."""
    return [*describe_learning(plan, report), describe_product(plan, report), *describe_next(plan)]


@pytest.fixture
def plan(quick_config, tmp_path: Path) -> Plan:
    config = quick_config(tmp_path / "run", f"method.alpha={ALPHA}", "train.batch_size=2")
    return make_plan(config, torch.device("cpu"), resume=None)


@pytest.fixture
def batches(plan: Plan) -> Iterator[Batches]:
    batches = make_batches(plan, encode(plan, ALONE, lambda line: None), ALONE)
    yield batches
    batches.close()


def injected(plan: Plan) -> tuple[SD3Transformer2DModel, dict[str, Tensor]]:
    """The model with layers at their start, and other weights than those: as trained, not folded."""
    transformer = load_transformer(plan.base, torch.float32)
    parameters = plan.method.inject(transformer, lambda name: generator(0, name))
    weights = {name: torch.randn(p.shape, generator=generator(1, name)) * 0.1 for name, p in parameters.items()}
    return transformer, weights


def test_block_norms_are_those_of_the_whole_product() -> None:
    factors, expected = {}, {}
    shapes = {"transformer_blocks.0.attn.to_q": (64, 32), "transformer_blocks.0.attn.to_out.0": (32, 48),
              "transformer_blocks.11.attn2.to_q": (16, 16), "proj_out": (8, 64)}  # fmt: skip
    for name, (outputs, inputs) in shapes.items():
        a, b = (
            torch.randn(4, inputs, generator=generator(1, name)),
            torch.randn(outputs, 4, generator=generator(2, name)),
        )
        factors[f"{name}.lora_A"], factors[f"{name}.lora_B"] = a, b
        expected[name] = torch.linalg.matrix_norm(b.double() @ a.double()).item()
    assert block_norms(factors) == pytest.approx(
        {
            "block 0": math.hypot(*list(expected.values())[:2]),
            "block 11": expected["transformer_blocks.11.attn2.to_q"],
            "elsewhere": expected["proj_out"],
        },
        rel=1e-12,
    )


def test_block_norms_of_a_start_are_zero() -> None:
    assert block_norms({"transformer_blocks.3.attn.to_q.lora_A": torch.randn(2, 8),
                        "transformer_blocks.3.attn.to_q.lora_B": torch.zeros(8, 2)}) == {"block 3": 0.0}  # fmt: skip


def velocities(plan: Plan, transformer: SD3Transformer2DModel, batches: Batches) -> list[tuple[Tensor, Batch]]:
    """At the fixed sigmas, on the noise and first image of the first steps: put together here once more."""
    found = []
    for step, sigma in enumerate(FIXED_SIGMAS):
        batch = batches.fetch(step, 0).rows(slice(1))
        embeds, pooled = plan.method.conditioning(batch.embeddings, transformer)
        with torch.no_grad():
            velocity = transformer(
                hidden_states=(1 - sigma) * batch.latents + sigma * batch.noise,
                timestep=torch.full((1,), 1000 * sigma),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
            ).sample
        found.append((velocity, batch))
    return found


def test_a_loss_of_0_is_not_divided_by(plan: Plan) -> None:
    loss = {"sigma": [0.5], "base": [0.0], "trained": [0.25]}
    report = {"block_changes": {"block 0": 1.0}, "velocity_change": 0.5, "fixed_noise_loss": loss}
    assert describe_learning(plan, report)[-1].endswith("0.5: 0.000 -> 0.250 (no comparison)")


def test_the_report_measures_the_exported_adapter_against_the_base(plan: Plan, batches: Batches) -> None:
    """Recomputed with (alpha / r) BA added to the weights."""
    transformer, weights = injected(plan)
    report = closing_report(plan, transformer, weights, batches)

    model = load_transformer(plan.base, torch.float32)
    before = velocities(plan, model, batches)
    for module in plan.modules:
        delta = weights[f"{module}.lora_B"].double() @ weights[f"{module}.lora_A"].double()
        weight = model.get_submodule(module).weight
        weight.data = (weight.double() + ALPHA / RANK * delta).float()
    after = velocities(plan, model, batches)
    losses = [
        [(v - (batch.noise - batch.latents)).square().mean().item() for v, batch in found] for found in (before, after)
    ]
    change = sum((a - b).norm().item() for (a, _), (b, _) in zip(after, before, strict=True))
    assert report["velocity_change"] == pytest.approx(change / sum(v.norm().item() for v, _ in before), rel=1e-4)
    assert report["velocity_change"] > 0.001
    assert report["changes_output"] is True
    assert report["fixed_noise_loss"]["sigma"] == list(FIXED_SIGMAS)
    assert report["fixed_noise_loss"]["base"] == pytest.approx(losses[0], rel=1e-5)
    assert report["fixed_noise_loss"]["trained"] == pytest.approx(losses[1], rel=1e-5)
    assert list(report["block_changes"]) == [f"block {number}" for number in range(4)]
    folded = {name: value * (1.5 if name.endswith("B") else 1) for name, value in weights.items()}
    assert report["block_changes"] == pytest.approx(block_norms(folded))


@pytest.mark.parametrize("b", [0.0, float("nan")])
def test_a_dead_adapter_changes_nothing(b: float, plan: Plan, batches: Batches) -> None:
    transformer, weights = injected(plan)
    dead = {name: torch.full_like(value, b) if name.endswith("B") else value for name, value in weights.items()}
    report = closing_report(plan, transformer, dead, batches)
    assert report["changes_output"] is False
    if b == 0:
        assert report["velocity_change"] == 0
        assert report["fixed_noise_loss"]["trained"] == report["fixed_noise_loss"]["base"]
        assert set(report["block_changes"].values()) == {0.0}
        assert summary(plan, report)[0].startswith("learned   one denoising step changes by 0 %")


def test_a_run_that_learned_nothing_says_so_and_keeps_its_adapter(quick_config, tmp_path: Path, capsys) -> None:
    with pytest.raises(RunError) as caught:
        run_training(quick_config(tmp_path / "run", "optimizer.lr=1e-30"))
    (line,) = caught.value.problems
    assert line == (
        f"{tmp_path / 'run'}: the adapter changes nothing: raise optimizer.lr or train.steps, or check method.targets"
    )
    assert len(read_adapter(tmp_path / "run").factors) == 38
    assert json.loads((tmp_path / "run" / "run.json").read_text())["report"]["changes_output"] is False
    assert "one denoising step changes by" in capsys.readouterr().out


def test_the_summary_names_changes_losses_and_the_next_command(plan: Plan) -> None:
    report = {
        "weights": "ema",
        "block_changes": {"block 0": 0.5, "block 1": 1.0, "block 2": 0.0},
        "velocity_change": 0.0173,
        "changes_output": True,
        "fixed_noise_loss": {"sigma": [0.2, 0.8], "base": [2.0, 1.0], "trained": [1.5, 1.01]},
    }
    lines = summary(plan, report)
    assert (
        lines[0]
        == "learned   one denoising step changes by 1.73 %; norm of the weight update per block |▄█ |, at most 1"
    )
    assert lines[1].endswith("by sigma: 0.2: 2.000 -> 1.500 (-25.0 %), 0.8: 1.000 -> 1.010 (+1.0 %)")
    assert lines[2] == f"adapter   {plan.run / 'adapter'} (the average, EMA; as trained: adapter_raw)"
    assert summary(plan, {**report, "weights": "raw"})[2] == f"adapter   {plan.run / 'adapter'}"
    assert lines[-1].strip() == infer_command(plan.method, plan.run, plan.records[0].caption)
    assert lines[-2].strip() == f"sd3tune report {plan.run}"


@pytest.mark.parametrize(
    ("change", "loss", "options", "warned"),
    [
        (0.75, 2.0, (), False), (0.76, 1.0, (), True), (1.27, 2.0, (), True), (1.27, 0.99, (), False),
        (math.nan, 2.0, (), False), (1.27, math.nan, (), False),
        (1.27, 2.0, ("method={kind: full}",), True),
        (1.0, 2.0, ("method={kind: full}", "model.init=random"), False),
    ],
)  # fmt: skip
def test_the_summary_warns_of_a_change_that_only_a_diverged_training_makes(
    quick_config, tmp_path: Path, change: float, loss: float, options: tuple[str, ...], warned: bool
) -> None:
    plan = make_plan(quick_config(tmp_path / "run", *options), torch.device("cpu"), resume=None)
    report = {
        "weights": "raw", "block_changes": {"block 0": 1.0}, "velocity_change": change, "changes_output": True,
        "fixed_noise_loss": {"sigma": [0.5], "base": [1.0], "trained": [loss]},
    }  # fmt: skip
    said = "warning: one denoising step changes by more than 75 %, and the loss on training images is no lower"
    assert sum(line.startswith(said) for line in summary(plan, report)) == warned


def test_a_learning_rate_far_too_high_ends_with_a_warning_and_exit_code_0(quick_config, tmp_path: Path, capsys) -> None:
    run_training(quick_config(tmp_path / "run", "optimizer.lr=10"))
    assert "the training has diverged" in capsys.readouterr().out
    assert "the training has diverged.**" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("prompt", ["a photo of sks dog", 'it\'s "his" $HOME `dog`', "-n", "a\nb"])
def test_the_next_command_says_what_was_meant_whatever_the_caption(
    prompt: str, plan: Plan, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(infer_command(plan.method, tmp_path / "runs" / "my dog", prompt))
    assert words[:4] == ["sd3tune", "infer", "--lora", "runs/my dog"]
    assert words[4:] == ["--prompt", prompt, "--out", "runs/my dog/images"]
    assert shlex.split(infer_command(plan.method, Path("/elsewhere/run"), prompt))[3] == "/elsewhere/run"


def test_an_empty_caption_is_replaced_in_the_next_command(plan: Plan) -> None:
    wordless = replace(plan, records=[replace(plan.records[0], caption="")])
    report = {
        "weights": "raw", "block_changes": {"block 0": 1.0}, "velocity_change": 0.1, "changes_output": True,
        "fixed_noise_loss": {"sigma": [0.5], "base": [1.0], "trained": [1.0]},
    }  # fmt: skip
    assert "--prompt 'a photo'" in summary(wordless, report)[-1]


def test_the_error_of_a_rounded_file_is_reported(quick_config, tmp_path: Path) -> None:
    """Recomputed with the rounded factors, and with the exact ones, added to the weights."""
    config = quick_config(tmp_path / "run", f"method.alpha={ALPHA}", "method.export_dtype=bf16")
    plan = make_plan(config, torch.device("cpu"), resume=None)
    batches = make_batches(plan, encode(plan, ALONE, lambda line: None), ALONE)
    transformer, weights = injected(plan)
    report = closing_report(plan, transformer, weights, batches)

    def with_factors(rounded: bool) -> list[Tensor]:
        model = load_transformer(plan.base, torch.float32)
        for module in plan.modules:
            up, down = ALPHA / RANK * weights[f"{module}.lora_B"], weights[f"{module}.lora_A"]
            product = up.bfloat16().double() @ down.bfloat16().double() if rounded else up.double() @ down.double()
            weight = model.get_submodule(module).weight
            weight.data = (weight.double() + product).float()
        return [velocity for velocity, _ in velocities(plan, model, batches)]

    exact, rounded = with_factors(False), with_factors(True)
    error = sum((a - b).norm().item() for a, b in zip(exact, rounded, strict=True)) / sum(
        v.norm().item() for v in exact
    )
    assert report["rounding_error"] == pytest.approx(error, rel=1e-2)
    assert 1e-5 < error < 1e-1
    line = f"rounding  bf16 in the file changes one denoising step by {100 * error:.2g} %"
    assert line in describe_learning(plan, report)
    batches.close()

"""`method.rank: auto`: ranks by the gradient of each weight, within a budget of megabytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.train import run_training
from sd3tune.errors import RunError, UserError
from sd3tune.flow.objective import interpolate
from sd3tune.model.load.components import load_transformer
from sd3tune.model.lora.ranks import Cost, equal_ranks, ranks_by_need
from sd3tune.run.batches import make_batches
from sd3tune.run.encoding import encode
from sd3tune.run.gradients import STEPS, gradient_norms
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.processes import ALONE
from sd3tune.training.loop import View

BUDGET_MB = 0.06
AUTO = (f"method={{kind: lora, rank: auto, budget_mb: {BUDGET_MB}, alpha: 2.0}}", "checkpoint={every: 1, keep: 9}")
COSTS = {f"transformer_blocks.{block}.{name}": Cost(0, price, 64) for block in (0, 1) for name, price in
         (("attn.to_q", 10), ("ff.net.2", 30))}  # fmt: skip


def spent(ranks: dict[str, int]) -> int:
    return sum(COSTS[name].per_rank * rank for name, rank in ranks.items())


@pytest.mark.parametrize("budget", [80, 81, 99, 100, 399, 1000, 5120, 9999])
def test_a_budget_is_spent_and_never_exceeded(budget: int) -> None:
    needs = dict(zip(COSTS, (1.0, 0.0, 5.0, 2.0), strict=True))
    for ranks in (equal_ranks(COSTS, budget), ranks_by_need(COSTS, needs, budget)):
        assert min(ranks.values()) >= 1
        assert max(ranks.values()) <= 64
        assert spent(ranks) <= budget
    assert budget - spent(ranks_by_need(COSTS, needs, budget)) < 10 or budget > 5120
    equal = equal_ranks(COSTS, budget)
    assert max(equal.values()) - min(equal.values()) <= 1
    assert equal["transformer_blocks.0.attn.to_q"] == equal["transformer_blocks.1.attn.to_q"]


def test_ranks_follow_the_needs() -> None:
    ranks = ranks_by_need(COSTS, dict(zip(COSTS, (4.0, 1.0, 2.0, 0.0), strict=True)), 80 + 900)
    assert list(ranks.values()) == [1 + 40, 1 + 10, 1 + 20, 1]


def test_norms_are_those_of_the_whole_gradient(quick_config, tmp_path: Path) -> None:
    plan = make_plan(quick_config(tmp_path / "run", *AUTO), torch.device("cpu"), resume=None)
    encoded = encode(plan, ALONE, lambda line: None)
    found = gradient_norms(plan, encoded, load_transformer(plan.base, torch.float32), ALONE, plan.modules)
    transformer, batches = load_transformer(plan.base, torch.float32), make_batches(plan, encoded, ALONE)
    expected = dict.fromkeys(plan.modules, 0.0)
    weights = {name: transformer.get_submodule(name).weight for name in plan.modules}
    for weight in weights.values():
        weight.requires_grad_(True)
    for step in range(STEPS):
        batch = batches.fetch(step, 0).rows(slice(1))
        embeds, pooled = plan.method.conditioning(batch.embeddings, transformer)
        velocity = transformer(
            hidden_states=interpolate(batch.latents, batch.noise, batch.sigma), timestep=1000 * batch.sigma,
            encoder_hidden_states=embeds, pooled_projections=pooled,
        ).sample  # fmt: skip
        loss = (velocity - (batch.noise - batch.latents)).square().mean()
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            expected[name] += gradient.norm().item()
    batches.close()
    assert found == pytest.approx(expected, rel=1e-4)
    assert max(found.values()) > 2 * min(found.values())


def stop(view: View) -> None:
    if view.step == 2:
        raise InterruptedError


def test_a_run_keeps_its_ranks_and_its_budget(
    quick_config, tmp_path: Path, assert_equal_runs, capsys, monkeypatch
) -> None:
    run_training(quick_config(tmp_path / "straight", *AUTO))
    with pytest.raises(InterruptedError):
        run_training(quick_config(tmp_path / "run", *AUTO), callbacks=[stop])
    with monkeypatch.context() as without:
        without.setattr("sd3tune.run.state.gradient_norms", lambda *_: pytest.fail("they are in the checkpoint"))
        run_training(quick_config(tmp_path / "run", *AUTO), resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors"
    size = sum(tensor.nbytes for tensor in load_file(file).values()) / 1e6
    assert 0.98 * BUDGET_MB < size <= BUDGET_MB
    adapter = read_adapter(file)
    ranks = {len(down) for down, _ in adapter.factors.values()}
    assert len(ranks) > 2
    assert adapter.contract["rank"] in ranks
    assert adapter.contract["budget_mb"] == BUDGET_MB
    assert f"ranks {min(ranks)} to {max(ranks)}" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"--resume: method\.budget_mb: 0\.06 in the run, 0\.07 now"):
        run_training(quick_config(tmp_path / "run", *AUTO, "method.budget_mb=0.07", "train.steps=4"), resume=True)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("{rank: auto}", "rank: auto and budget_mb go together, and budget_mb is not set"),
        ("{rank: 4, budget_mb: 1}", "rank: auto and budget_mb go together, and rank is 4"),
        ("{rank: auto, budget_mb: 1, rank_pattern: {attn.to_q: 2}}", "it does not go with rank_pattern"),
        ("{rank: auto, budget_mb: 1, init: orthogonal}", "rank auto is not even"),
        ("{kind: lokr, rank: auto}", "is not an integer"),
    ],
)
def test_what_does_not_go_together_is_one_line(quick_config, tmp_path: Path, method: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        quick_config(tmp_path, f"method={method}")
    (line,) = caught.value.problems
    assert says in line


def test_a_budget_below_rank_1_is_refused_before_anything_is_loaded(quick_config, tmp_path: Path) -> None:
    config = quick_config(tmp_path, "method={rank: auto, budget_mb: 0.001}")
    with pytest.raises(UserError, match=r"method\.budget_mb: 0\.001 is too small: rank 1 in 38 modules takes 0\.02 MB"):
        make_plan(config, torch.device("cpu"), resume=None)


def test_the_line_of_a_budget_reads_as_one_would_say_it(quick_config, tmp_path: Path) -> None:
    method = "method={kind: lora, rank: auto, budget_mb: 1000, text_encoders: {clip_l: {}}}"
    plan = make_plan(quick_config(tmp_path / "run", method), torch.device("cpu"), resume=None)
    limit = "for at most 1000 MB, without the text encoders; CLIP-L, rank 16"
    assert plan.method.title() == f"lora, ranks by gradients {limit}"
    plan.method.prepare(load_transformer(plan.base, torch.float32), {}, lambda names: dict.fromkeys(names, 1.0))
    assert plan.method.title() == f"lora, rank 64 everywhere {limit}"

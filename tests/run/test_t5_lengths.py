"""Runs at several T5 lengths: what they measure, state and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.train import run_training
from sd3tune.errors import RunError
from sd3tune.model.base.resolve import resolve_base
from sd3tune.run.contract import make_contract, run_identity
from sd3tune.run.describe import describe
from sd3tune.run.preflight import make_plan

SEVERAL = ("model.extra_t5_lengths=[24, 20, 24]",)


def test_what_is_measured_and_shown_uses_the_own_length(quick_config, tmp_path: Path) -> None:
    """The base's losses and picture are those of a run at one length; the trained weights differ."""
    settings = (
        "train.steps=2", "validation={holdout: 1, every: 2}", "preview={every: 2, prompts: [a dog], steps: 1}",
        "method.init=true",
    )  # fmt: skip
    runs = {name: tmp_path / name for name in ("one", "several")}
    run_training(quick_config(runs["one"], *settings))
    run_training(quick_config(runs["several"], *settings, *SEVERAL))
    of = {}
    for name, run in runs.items():
        report = json.loads((run / "run.json").read_text())["report"]
        validated = json.loads((run / "validation.jsonl").read_text().splitlines()[0])
        of[name] = (
            report["fixed_noise_loss"]["base"], validated["base_loss_by_sigma"], validated["loss_by_sigma"],
            (run / "samples" / "base-0.png").read_bytes(),
        )  # fmt: skip
    assert of["one"] == of["several"]
    adapters = {name: read_adapter(run) for name, run in runs.items()}
    assert "t5_lengths" not in adapters["one"].contract
    contract = adapters["several"].contract
    assert (contract["max_sequence_length"], contract["t5_lengths"]) == (16, [16, 20, 24])
    module = next(iter(adapters["one"].factors))
    assert not torch.equal(adapters["one"].factors[module][1], adapters["several"].factors[module][1])


def test_a_run_at_several_lengths_resumes_exactly_and_keeps_them(
    quick_config, tmp_path: Path, assert_equal_runs, capsys
) -> None:
    settings = (*SEVERAL, "train.batch_size=2", "train.steps=4", "checkpoint.every=1")

    def stop(view) -> None:
        if view.step == 2:
            raise InterruptedError

    run_training(quick_config(tmp_path / "straight", *settings))
    config = quick_config(tmp_path / "run", *settings)
    with pytest.raises(InterruptedError):
        run_training(config, callbacks=[stop])
    for other, line in (
        ((), "[16, 20, 24] in the run, null now"),
        (("model.extra_t5_lengths=[20]",), "[16, 20, 24] in the run, [16, 20] now"),
    ):
        with pytest.raises(RunError) as caught:
            run_training(quick_config(tmp_path / "run", *settings, "model.extra_t5_lengths=[]", *other), resume=True)
        assert f"--resume: model.t5_lengths: {line}" in caught.value.problems
    capsys.readouterr()
    same = quick_config(tmp_path / "run", *settings, "model.extra_t5_lengths=[20, 16, 24]")
    run_training(same, resume=True)
    assert "T5        16, 20, 24 tokens, one length a step" in capsys.readouterr().out
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "nothing", "says"),
    [
        ((), "[16]", False),  # the length that it has
        (("model.t5=false",), "[20]", True),
    ],
    ids=["own", "without T5"],
)
def test_a_length_that_adds_nothing_leaves_identity_and_contract_as_they_were(
    quick_config, tmp_path: Path, settings: tuple[str, ...], nothing: str, says: bool
) -> None:
    """So a run from before there was the key resumes."""
    plan, same = (
        make_plan(quick_config(tmp_path, *settings, *more), torch.device("cpu"), resume=None)
        for more in ((), (f"model.extra_t5_lengths={nothing}",))
    )
    assert run_identity(plan, None, 1) == run_identity(same, None, 1)
    assert run_identity(plan, None, 1)["model"].keys() == {"base", "dtype", "max_sequence_length", "t5"}
    assert make_contract(plan) == make_contract(same)
    assert ("note: model.extra_t5_lengths has no effect with model.t5=false" in describe(same, 1)) == says
    assert not any("extra_t5_lengths" in line for line in describe(plan, 1))


@pytest.mark.parametrize(("length", "warned"), [(16, False), (20, False), (17, True)])
def test_a_base_that_was_trained_at_several_lengths_is_used_at_any_of_them(
    quick_config, tmp_path: Path, length: int, warned: bool
) -> None:
    base = Path(shutil.copytree(resolve_base("tiny").path, tmp_path / "base"))
    (base / "sd3tune.json").write_text(json.dumps({"max_sequence_length": 16, "t5_lengths": [16, 20]}))
    settings = (f"model.base={base}", f"model.max_sequence_length={length}")
    plan = make_plan(quick_config(tmp_path / "run", *settings), torch.device("cpu"), resume=None)
    found = [line for line in describe(plan, 1) if "was trained on 16, 20 T5 tokens" in line]
    assert len(found) == warned

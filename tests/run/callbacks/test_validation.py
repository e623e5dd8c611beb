"""Held-out loss: measured on other images, at fixed noise, for base and adapter; the adapter of the lowest is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from sd3tune.adapter.attach import attach
from sd3tune.adapter.file import read_adapter
from sd3tune.commands.train import run_training
from sd3tune.data.sampler import generator
from sd3tune.errors import UserError
from sd3tune.model.compute.hoist import AheadLinear
from sd3tune.model.load.components import load_transformer, load_vae
from sd3tune.model.load.text import assemble
from sd3tune.run.callbacks.validation import SIGMAS, Validation
from sd3tune.run.describe import describe
from sd3tune.run.encoding import encode
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.processes import ALONE, Processes
from sd3tune.tracking.base import Start
from sd3tune.tracking.trackers import Trackers

SETTINGS = ("validation={holdout: 2, every: 2}", "train.steps=5", "checkpoint.every=1", "checkpoint.keep=9")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(quick_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "validated"
    run_training(quick_config(run, *SETTINGS, "ema={decay: 0.5}"))
    return run


def plan_of(config):
    return make_plan(config, torch.device("cpu"), resume=None)


def test_it_is_measured_before_the_first_step_every_so_often_and_after_the_last(run: Path) -> None:
    found = lines(run)
    assert [line["step"] for line in found] == [0, 2, 4, 5]
    assert found[0]["loss"] == pytest.approx(found[0]["base_loss"], rel=1e-6)  # B = 0
    for line in found:
        assert line["images"] == 2
        assert line["weights"] == "ema"
        assert list(line["loss_by_sigma"]) == ["0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0"]
        assert line["loss"] == pytest.approx(sum(line["loss_by_sigma"].values()) / 5)
        assert line["base_loss_by_sigma"] == found[0]["base_loss_by_sigma"]
    assert found[-1]["loss"] != found[0]["loss"]


def test_the_loss_is_that_of_the_checkpoints_adapter_computed_apart(run: Path, quick_config) -> None:
    """With the file of step 4 loaded into a fresh model, and embeddings and moments from the store."""
    plan = plan_of(quick_config(run, *SETTINGS, "ema={decay: 0.5}"))
    encoded = encode(plan, ALONE, lambda line: None)
    transformer, vae = load_transformer(plan.base, torch.float32), load_vae(plan.base, torch.float32)
    attach(transformer, read_adapter(run / "checkpoints" / "step-000004"), "default")
    losses = []
    for number, example in enumerate(encoded.holdout):
        entry = encoded.store.get(example.images[0])
        text = {e: {k: v[None] for k, v in encoded.store.get(of).items()} for e, of in example.captions.items()}
        joint = transformer.config.joint_attention_dim
        embeds, pooled = assemble(text["clip_l"], text["clip_g"], text["t5"]["hidden"], 16, joint)
        eps, noise = torch.randn((2, *entry["mean"].shape), generator=generator(0, "validation", number))
        z0 = (entry["mean"] + entry["std"] * eps - vae.config.shift_factor) * vae.config.scaling_factor
        for sigma in SIGMAS:
            with torch.no_grad():
                velocity = transformer(
                    ((1 - sigma) * z0 + sigma * noise)[None], embeds, pooled, torch.tensor([1000 * sigma])
                ).sample
            losses.append((velocity[0] - (noise - z0)).square().mean().item())
    assert lines(run)[2]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_held_out_loss_and_closing_report_compute_modulations_ahead(
    quick_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each forward pass copies the layers' weights, a third of the model, to the device."""
    known = []
    forward = AheadLinear.forward
    monkeypatch.setattr(
        AheadLinear, "forward", lambda layer, temb: known.append(layer.rows is not None) or forward(layer, temb)
    )
    run_training(quick_config(tmp_path / "ahead", *SETTINGS, "train.steps=2"))
    assert known
    assert all(known)
    run_training(quick_config(tmp_path / "plain", *SETTINGS, "train.steps=2", "train.hoist=false"))
    ahead, plain = lines(tmp_path / "ahead")[0], lines(tmp_path / "plain")[0]
    assert ahead == plain, "before the first step, from which on training differs by rounding"


def test_the_adapter_with_the_lowest_loss_is_kept_and_says_what_it_is(run: Path, adapter_of) -> None:
    best = min(lines(run), key=lambda line: line["loss"])
    assert json.loads((run / "best" / "validation.json").read_text()) == best
    kept = adapter_of(run / "best")
    checkpoint = adapter_of(run / "checkpoints" / f"step-{best['step']:06d}") if best["step"] else None
    assert checkpoint is None or all(torch.equal(kept[name], tensor) for name, tensor in checkpoint.items())
    assert read_adapter(run / "best").contract["weights"] == "ema"


def test_a_higher_loss_leaves_the_lowest_where_it_is(quick_config, tmp_path: Path, adapter_of, capsys) -> None:
    """A learning rate that wrecks the adapter at once: the start keeps the lowest loss."""
    run_training(quick_config(tmp_path, *SETTINGS, "optimizer.lr=3", "train.steps=2"))
    assert all(line["loss"] > lines(tmp_path)[0]["loss"] for line in lines(tmp_path)[1:])
    assert json.loads((tmp_path / "best" / "validation.json").read_text())["step"] == 0
    said = capsys.readouterr().out
    assert re.search(r"; the lowest held-out loss was \d\.\d{4} at step 0, kept in best/\n", said)
    assert "\n          a lower loss does not mean better pictures: compare previews before taking one\n" in said
    assert all(not tensor.any() for name, tensor in adapter_of(tmp_path / "best").items() if "lora_B" in name)


def test_held_out_images_are_not_trained_on(quick_config, tmp_path: Path) -> None:
    plan = plan_of(quick_config(tmp_path, *SETTINGS))
    trained, held = ({record.image for record in of} for of in (plan.records, plan.holdout))
    assert len(trained) == 3
    assert len(held) == 2
    assert not trained & held
    assert "held out  2 images, measured every 2 steps" in describe(plan, 1)
    more = plan_of(quick_config(tmp_path, "validation.holdout=3"))
    assert held < {record.image for record in more.holdout}


def test_a_folder_may_be_held_out(quick_config, tmp_path: Path, write_images) -> None:
    others = write_images(tmp_path / "others", 2)
    (others / "0.txt").unlink()
    config = quick_config(tmp_path / "run", "data.sources.0.caption=a dog", f"validation.holdout={others}")
    plan = plan_of(config)
    assert len(plan.records) == 5
    assert [record.caption for record in plan.holdout] == ["a dog", "a green picture of sks dog"]


def test_held_out_images_that_are_trained_on_are_named(quick_config, tiny_images: Path, tmp_path: Path, capsys) -> None:
    run_training(quick_config(tmp_path, f"validation.holdout={tiny_images}", "train.steps=1"))
    warning = "5 of the held-out images are also trained on, so their loss is misleading: 0.png, 1.png, 2.png, ..."
    assert f"warning: {warning}" in capsys.readouterr().out
    assert warning in json.loads((tmp_path / "run.json").read_text())["warnings"]


def test_the_run_does_not_notice_its_validation(quick_config, tmp_path: Path, write_images, assert_equal_runs) -> None:
    others = write_images(tmp_path / "others", 2)
    dropout = "method.dropout=0.3"
    run_training(quick_config(tmp_path / "with", dropout, f"validation={{holdout: {others}, every: 1}}"))
    run_training(quick_config(tmp_path / "without", dropout))
    for name in ("best/adapter/pytorch_lora_weights.safetensors", "validation.jsonl"):
        (tmp_path / "with" / name).unlink()
    assert_equal_runs(tmp_path / "without", tmp_path / "with")


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_resumed_run_has_every_measurement_once_and_the_same_best(
    run: Path, quick_config, tmp_path: Path, assert_equal_runs, step: int
) -> None:
    def stop(view) -> None:
        if view.step == step:
            raise InterruptedError

    config = quick_config(tmp_path, *SETTINGS, "ema={decay: 0.5}", "checkpoint.every=2")
    with pytest.raises(InterruptedError):
        run_training(config, callbacks=[stop])
    run_training(quick_config(tmp_path, *SETTINGS, "ema={decay: 0.5}"), resume=True)
    assert lines(tmp_path) == lines(run)
    assert (tmp_path / "best" / "validation.json").read_text() == (run / "best" / "validation.json").read_text()


def test_processes_divide_the_images(quick_config, tmp_path: Path, assembled_view) -> None:
    config = quick_config(tmp_path, "validation.holdout=3")
    plan = plan_of(config)
    encoded = encode(plan, ALONE, lambda line: None)
    view = assembled_view(plan)
    trackers = Trackers(config.tracking, Start("none", tmp_path, {}), print)

    def of(processes: Processes) -> Validation:
        return Validation(plan, encoded, processes, {"weights": "raw"}, trackers, from_step=0)

    alone = of(ALONE)._measure(view)

    def as_rank(rank: int, gather) -> Validation:
        return of(Processes(rank, 2, lambda t: t, gather, lambda: None))

    shares: list[list[torch.Tensor]] = [[], []]
    for rank in range(2):
        as_rank(rank, lambda tensor, rank=rank: shares[rank].append(tensor) or tensor[None])._measure(view)
    rounds = iter([torch.stack(of) for of in zip(*shares, strict=True)])
    assert as_rank(0, lambda tensor: next(rounds))._measure(view) == alone


@pytest.fixture
def assembled_view():
    from sd3tune.training.loop import View

    def make(plan):
        transformer = load_transformer(plan.base, plan.dtype)
        parameters = plan.method.inject(transformer, lambda name: generator(0, "init", name))
        weights = {name: torch.randn_like(of) * 0.1 for name, of in parameters.items()}
        return View(0, False, transformer, plan.method, weights)

    return make


def test_holding_out_everything_is_refused(quick_config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"validation\.holdout: 5 of 5 images would leave none to train on"):
        plan_of(quick_config(tmp_path, "validation.holdout=5"))
    with pytest.raises(UserError, match=r"validation\.holdout: .*nowhere: no such folder"):
        plan_of(quick_config(tmp_path, f"validation.holdout={tmp_path / 'nowhere'}"))

"""Dropout beside a prior of kind `prediction` spares the kept samples, but not in a run of an earlier version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sd3tune.commands.train import run_training
from sd3tune.training.checkpoint import list_checkpoints, read_state
from sd3tune.training.loop import View

PRIOR = "data.sources.0.prior={kind: prediction, prompt: a toy}"
SETTINGS = ("train.steps=4", "checkpoint={every: 1, keep: 1}", "data.buckets=false")
SAID = "warning: an earlier sd3tune began this run; as then, dropout of captions and encoders also acts on the samples"


def stop_at_2(view: View) -> None:
    if view.step == 2:
        raise InterruptedError


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ((PRIOR, "data.caption_dropout=0.9"), True),
        ((PRIOR, "data.encoder_dropout=0.9"), True),
        (("data.sources.0.prior={kind: prediction, prompt: a toy, weight: 0}", "data.caption_dropout=0.9"), False),
    ],
)
def test_a_run_goes_on_with_the_maths_that_it_began_with(
    quick_config, tmp_path: Path, adapter_of, edit_json, capsys, settings: tuple[str, ...], whole: bool
) -> None:
    straight = quick_config(tmp_path / "straight", *SETTINGS, *settings)
    run_training(straight)
    run = tmp_path / "run"
    config = quick_config(run, *SETTINGS, *settings)
    with pytest.raises(InterruptedError):
        run_training(config, callbacks=[stop_at_2])
    (state,) = run.glob("checkpoints/*/state.json")
    data = read_state(state.parent)["identity"]["data"]
    assert data.get("kept_captions") == ("whole" if whole else None)
    edit_json(state, lambda found: found["identity"]["data"].pop("kept_captions", None))  # as 3cdfac5 wrote it
    assert SAID not in capsys.readouterr().out
    run_training(config, resume=True)
    assert (SAID in capsys.readouterr().out) is whole
    assert "kept_captions" not in read_state(list_checkpoints(run)[-1])["identity"]["data"]
    ours, theirs = adapter_of(run), adapter_of(tmp_path / "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) is not whole
    run_training(config, resume=True)
    assert "already finished; nothing to do" in capsys.readouterr().out

"""Training on streams: resume, store, broken samples, and what is refused."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch

from sd3tune.commands.cache import run_cache
from sd3tune.commands.train import run_training
from sd3tune.config import Config, dump_config
from sd3tune.errors import ConfigError, DataError, Interrupted, UserError
from sd3tune.forecast.forecast import forecast, forecast_inputs
from sd3tune.run.batches import make_batches
from sd3tune.run.contract import _in_words, run_identity
from sd3tune.run.encoding import Encoded, encode
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.processes import ALONE
from sd3tune.training.checkpoint import differences
from tests.shards import write_shards

NOTHING = Encoded(None, [], {}, [], [], {})  # type: ignore[arg-type]
ADAPTER = "adapter/pytorch_lora_weights.safetensors"


@pytest.fixture
def streamed(quick_config, tmp_path) -> Callable[..., Config]:
    """Return a function that makes the configuration of a run on four shards of five samples."""
    pattern = write_shards(tmp_path / "shards", 4, 5, broken=(3,))

    def make(run: str, *overrides: str) -> Config:
        sources = f"data.sources=[{{kind: webdataset, path: '{pattern}'}}]"
        store = f"data.cache_dir={tmp_path / 'store'}"
        more = ("data.stream.buffer=2", "train.batch_size=2", "checkpoint.every=2")
        return quick_config(tmp_path / run, sources, store, *more, *overrides)

    return make


def test_a_resumed_run_ends_like_one_that_was_never_stopped(streamed, tmp_path, capsys) -> None:
    """It stops within a window, after the last checkpoint."""
    run_training(streamed("whole", "train.steps=5"))
    assert "00003.png: cannot be decoded" in capsys.readouterr().out

    def stop(view) -> None:
        if view.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run_training(streamed("parts", "train.steps=5"), callbacks=[stop])
    run_training(streamed("parts", "train.steps=5"), resume=True)
    assert (tmp_path / "parts" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.stream.buffer=1", r"data\.buffer: 2 in the run, 1 now"),
        (
            "data.sources.0.template='a {caption}'",
            r"data\.shards: not the same shards, or settings of captions,",
        ),
    ],
)
def test_another_order_or_other_captions_are_not_resumed(streamed, override, message) -> None:
    config = streamed("run", override)
    plan = make_plan(config, torch.device("cpu"), None)
    before = run_identity(make_plan(streamed("run"), torch.device("cpu"), None), NOTHING, 1)
    lines = [_in_words(line) for line in differences(before, run_identity(plan, NOTHING, 1))]
    assert len(lines) == 1
    assert re.match(message, lines[0])


def test_settings_that_change_nothing_may_change_on_resume(streamed) -> None:
    more = streamed("run", "data.stream.store_gb=1", "data.stream.max_broken=3")
    one, two = (run_identity(make_plan(of, torch.device("cpu"), None), NOTHING, 1) for of in (streamed("run"), more))
    assert one == two


def batches_of(config: Config):
    plan = make_plan(config, torch.device("cpu"), None)
    return make_batches(plan, encode(plan, ALONE, lambda line: None), ALONE)


def test_kept_entries_are_equal_to_those_that_are_encoded_again(streamed, tmp_path) -> None:
    first = batches_of(streamed("run", "data.stream.store_gb=1"))
    written = [first.fetch(step, 0) for step in range(6)]
    first.close()
    again = batches_of(streamed("run"))
    read = [again.fetch(step, 0) for step in range(6)]
    assert len(again.store) > 12
    again.close()
    for a, b in zip(written, read, strict=True):
        assert a.names == b.names
        assert torch.equal(a.latents, b.latents)
        assert torch.equal(a.embeddings["t5"]["hidden"], b.embeddings["t5"]["hidden"])


def test_nothing_is_kept_by_default_and_no_more_than_the_limit(streamed, tmp_path) -> None:
    for limit, most in (("0", 0), ("0.00001", 10_000)):
        batches = batches_of(streamed("run", f"data.stream.store_gb={limit}"))
        for step in range(6):
            batches.fetch(step, 0)
        batches.close()
        batches.store.refresh()
        assert sum(entry.nbytes for entry in batches.store._index.values()) <= most
        assert bool(len(batches.store)) == bool(most)


def test_more_broken_samples_than_the_limit_end_the_run(streamed) -> None:
    with pytest.raises(DataError, match=r"max_broken: 1 samples are broken.*00003\.png: cannot be decoded"):
        run_training(streamed("run", "data.stream.max_broken=0", "train.steps=9"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("train.steps=null", "train.epochs=2"),
            r"train\.epochs: the number of samples in a stream is not known; set train\.steps",
        ),
        (("validation.holdout=1",), r"validation\.holdout: images of a stream cannot be held out; name a folder"),
        (("model.extra_t5_lengths=[32]",), r"model\.extra_t5_lengths: does not apply to streams"),
        (("data.export_tags=true",), r"data\.export_tags: the captions of a stream are not counted"),
        (("eval={}",), r"eval\.prompts: list some, as the captions of a stream are not known ahead"),
        (("data.sources.0.path=./nowhere/{0..1}.tar",), r"nowhere/0\.tar: no such file; check data\.sources"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(streamed, overrides, message) -> None:
    with pytest.raises(UserError, match=message):
        run_training(streamed("run", *overrides), dry_run=True)


def test_the_plan_counts_the_encoders_that_stay(streamed) -> None:
    config = streamed("run", "preview.prompts=[a dog]")
    plan = forecast(forecast_inputs(config, torch.float32))
    encoders = sum(plan.encoding[name].resident for name in ("clip_l", "clip_g", "t5", "vae"))
    assert encoders > 1_000_000
    assert plan.phases["train"].resident == plan.training.resident + encoders
    assert plan.phases["train"].working > plan.training.working
    assert plan.phases["preview"].resident == plan.training.resident + encoders
    assert plan.store is None


def test_a_stream_has_no_cache(streamed) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources: a stream is encoded while training"):
        run_cache(streamed("run"))


@pytest.mark.long
def test_two_processes_resume_as_if_never_stopped(streamed, tmp_path, start_cli) -> None:
    for name in ("whole", "parts"):
        (tmp_path / f"{name}.yaml").write_text(dump_config(streamed(name, "train.steps=8", "checkpoint.every=1")))
    command = ("--num-processes", "2")
    whole = start_cli("train", tmp_path / "whole.yaml", *command)
    assert whole.wait(timeout=300) == 0
    parts = start_cli("train", tmp_path / "parts.yaml", *command)
    while not (tmp_path / "parts" / "checkpoints" / "step-000003").exists():
        assert parts.poll() is None
        time.sleep(0.05)
    parts.terminate()
    parts.wait(timeout=300)
    assert not (tmp_path / "parts" / ADAPTER).exists()
    assert start_cli("train", tmp_path / "parts.yaml", *command, "--resume").wait(timeout=300) == 0
    assert (tmp_path / "parts" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()

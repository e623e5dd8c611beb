"""Runs over images of several shapes, and lengths in epochs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.errors import RunError, UserError
from sd3tune.run.batches import make_batches
from sd3tune.run.describe import describe
from sd3tune.run.encoding import encode
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.processes import ALONE
from sd3tune.training.loop import View

CPU = torch.device("cpu")
SHAPES = ((80, 80), (90, 80), (128, 80), (160, 90), (80, 128))
MIXED = (
    "train.batch_size=2", "train.gradient_accumulation=2", "data.flip=true", "data.caption_dropout=0.3",
    "data.encoder_dropout=0.3", "checkpoint={every: 3, keep: 2}", "schedule={kind: cosine, warmup_steps: 2}",
)  # fmt: skip
EPOCHS = ("train.steps=null", "train.epochs=5.3")
"""Passes over 6 samples in batches of 2 x 2: 8 steps."""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures: two squarish, two wide, one tall, and one of them is seen twice."""
    folder = tmp_path_factory.mktemp("shapes")
    for number, (width, height) in enumerate(SHAPES):
        image = Image.linear_gradient("L").resize((width, height)).rotate(90 * number)
        Image.merge("RGB", [image, image.transpose(0), Image.new("L", image.size, 50 * number)]).save(
            folder / f"{number}.png"
        )
        (folder / f"{number}.txt").write_text(f"picture number {number}")
    again = folder / "again"
    again.mkdir()
    (folder / "4.png").rename(again / "4.png")
    (folder / "4.txt").rename(again / "4.txt")
    return folder


@pytest.fixture(scope="module")
def mixed_config(quick_config, shapes: Path):
    """`mixed_config(run, ...)`: `quick_config` over the pictures of several shapes."""
    sources = f"data.sources=[{{path: {shapes}}}, {{path: {shapes / 'again'}, repeats: 2}}]"
    return lambda run, *overrides: quick_config(run, sources, *overrides)


@pytest.fixture(scope="module")
def straight(mixed_config, tmp_path_factory) -> Path:
    """A run that was never stopped, told its steps."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    run_training(mixed_config(run, *MIXED, "train.steps=8"))
    return run


def test_the_plan_shows_the_buckets_and_how_often_images_are_seen(mixed_config, tmp_path: Path) -> None:
    lines = describe(make_plan(mixed_config(tmp_path, *MIXED, *EPOCHS), CPU, None), 1)
    assert "buckets   64x64: 2, 80x48: 2, 48x80: 1" in lines
    assert "steps     8 x 4 images, 5.33 epochs: each image is seen 5 to 12 times" in lines


@pytest.mark.parametrize(
    ("steps", "batch", "world", "unseen"), [(8, 1, 1, False), (2, 4, 2, True), (5, 2, 2, False), (12, 3, 2, False)]
)
def test_how_often_images_are_seen_is_what_the_batches_hold(
    mixed_config, tmp_path: Path, steps, batch, world, unseen
) -> None:
    config = mixed_config(tmp_path, f"train.steps={steps}", f"train.batch_size={batch}", "seed=5")
    plan = make_plan(config, CPU, None, world)
    encoded = encode(plan, ALONE, lambda line: None)
    seen = Counter({record.image.name: 0 for record in plan.records})
    for rank in range(world):
        batches = make_batches(plan, encoded, dataclasses.replace(ALONE, rank=rank, world=world))
        for step in range(steps):
            seen.update(batches.fetch(step, 0).names)
        batches.close()
    assert sum(seen.values()) == steps * batch * world
    lines = describe(plan, world)
    assert any(line.endswith(f"seen {min(seen.values())} to {max(seen.values())} times") for line in lines)
    assert (0 in seen.values()) == unseen
    assert any(line.startswith("warning: some images are never seen") for line in lines) == unseen


def test_a_mixed_run_stopped_and_resumed_equals_one_never_stopped(
    mixed_config, straight: Path, tmp_path: Path, assert_equal_runs, capsys
) -> None:
    """This one is told its epochs, which come to the same steps."""

    def stop(view: View) -> None:
        if view.step == 5:
            raise InterruptedError

    config = mixed_config(tmp_path, *MIXED, *EPOCHS)
    with pytest.raises(InterruptedError):
        run_training(config, callbacks=[stop])
    run_training(config, resume=True)
    assert_equal_runs(straight, tmp_path)
    saved = load_config(tmp_path / "config.yaml").config.train
    assert (saved.steps, saved.epochs) == (8, None)
    capsys.readouterr()
    run_training(config, resume=True)
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.buckets=false", "data.images: "),
        ("data.caption_dropout=0.2", "data.caption_dropout: 0.3 in the run, 0.2 now"),
        ("data.encoder_dropout=0.2", "data.encoder_dropout: 0.3 in the run, 0.2 now"),
        ("seed=0", "train.steps: 8 in the run, 9 now"),
    ],
)
def test_what_changes_the_maths_is_refused_on_resuming(mixed_config, straight: Path, override, problem) -> None:
    config = mixed_config(straight, *MIXED, "train.steps=null", "train.epochs=6", override)
    with pytest.raises(RunError) as caught:
        run_training(config, resume=True)
    assert any(line.startswith(f"--resume: {problem}") for line in caught.value.problems)


def test_the_adapter_and_its_card_say_how_images_and_captions_were_used(straight: Path) -> None:
    contract = read_adapter(straight).contract
    assert (contract["buckets"], contract["caption_dropout"], contract["encoder_dropout"]) == (True, 0.3, 0.3)
    card = (straight / "README.md").read_text()
    assert "| resolution | 64 px, aspect buckets |" in card
    assert "| dropout | caption 0.3, text encoder 0.3 |" in card
    assert "| steps | 8, batch 2 x 2 |" in card


@pytest.mark.parametrize(
    ("epochs", "batch", "world", "steps"),
    [(1, 1, 1, 6), (2, 4, 1, 3), (2, 4, 2, 2), (0.01, 1, 1, 1), (1.1, 1, 1, 7), (0.5, 1, 1, 3), (7, 4, 1, 11)],
)
def test_epochs_are_rounded_up_to_a_step_of_all_processes(mixed_config, tmp_path: Path, epochs, batch, world, steps):
    config = mixed_config(
        tmp_path, "train.steps=null", f"train.epochs={epochs}", f"train.gradient_accumulation={batch}"
    )
    plan = make_plan(config, CPU, None, world)
    assert plan.config.train.total_steps == steps


def test_a_tenth_of_an_epoch_is_exactly_that(quick_config, write_images, tmp_path: Path) -> None:
    """0.1 * 30 is a little above 3 in floating point."""
    folder = write_images(tmp_path / "pictures", 3)
    config = quick_config(
        tmp_path, f"data.sources=[{{path: {folder}, repeats: 10}}]", "train.steps=null", "train.epochs=0.1"
    )
    plan = make_plan(config, CPU, None)
    assert plan.config.train.steps == 3
    assert "3 x 1 image, 0.1 epochs: each image is seen 0 to 2 times" in "\n".join(describe(plan, 1))


def test_a_warm_up_as_long_as_the_epochs_is_refused(mixed_config, tmp_path: Path) -> None:
    config = mixed_config(tmp_path, "train.steps=null", "train.epochs=1", "schedule.warmup_steps=6")
    with pytest.raises(UserError, match=r"schedule\.warmup_steps is 6 but train\.epochs 1 is 6 steps"):
        make_plan(config, CPU, None)
    fits = mixed_config(tmp_path, "train.steps=null", "train.epochs=1", "schedule.warmup_steps=5")
    assert make_plan(fits, CPU, None).config.train.steps == 6


def test_without_buckets_every_image_is_cut_to_the_square(mixed_config, tmp_path: Path) -> None:
    plan = make_plan(mixed_config(tmp_path, "data.buckets=false"), CPU, None)
    assert plan.buckets == [(64, 64)]
    assert not [line for line in describe(plan, 1) if line.startswith("buckets")]


@pytest.mark.parametrize("chance", ["data.caption_dropout", "data.encoder_dropout"])
def test_the_configured_dropout_reaches_the_batches(mixed_config, tmp_path: Path, chance: str) -> None:
    plan = make_plan(mixed_config(tmp_path, f"{chance}=1.0"), CPU, None)
    encoded = encode(plan, ALONE, lambda line: None)
    batches = make_batches(plan, encoded, ALONE)
    batch = batches.fetch(0, 0)
    batches.close()
    for encoder, entry in batch.embeddings.items():
        for name, tensor in entry.items():
            if chance == "data.caption_dropout":
                assert torch.equal(tensor[0], encoded.store.get(encoded.captions[encoder][""])[name])
                assert tensor.any()
            else:
                assert not tensor.any()

"""Runs over several sizes: shares, images that are too small, and each size as in a run of its own."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.data_check import run_data_check
from sd3tune.commands.train import run_training
from sd3tune.config import Config
from sd3tune.data.buckets import bucket_table
from sd3tune.errors import UserError
from sd3tune.forecast.forecast import forecast, forecast_inputs
from sd3tune.forecast.knobs import knobs
from sd3tune.model.load.components import load_transformer
from sd3tune.run.batches import make_batches
from sd3tune.run.describe import describe
from sd3tune.run.encoding import Encoded, encode
from sd3tune.run.knobs import training_knob
from sd3tune.run.preflight import Plan, make_plan
from sd3tune.run.setup import load_base
from sd3tune.runtime.processes import ALONE
from sd3tune.training.batches import Batches
from sd3tune.training.loop import View
from sd3tune.training.objective import make_objective

CPU = torch.device("cpu")
PHOTOS = {"large": (128, 128), "square": (100, 100), "wide": (160, 96), "small": (70, 70)}
"""Name -> width and height. At 96 px, `small` is too small."""
TWO = "data.resolution=[64, 96]"
BY_SIZE = ("flow.shift=resolution", "flow.weighting={kind: min_snr}", "data.buckets=false")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, (name, size) in enumerate(PHOTOS.items()):
        image = Image.linear_gradient("L").resize(size).rotate(90 * number)
        Image.merge("RGB", [image, image.transpose(0), Image.new("L", size, 60 * number)]).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} picture")
    return folder


@pytest.fixture(scope="module")
def config(quick_config, photos: Path):
    """`config(run, *overrides, source="...")`: a run on the photos; `source` adds keys to their source."""
    return lambda run, *overrides, source="": quick_config(
        run, f"data.sources=[{{path: {photos}{source}}}]", *overrides
    )


def plan_of(config: Config) -> Plan:
    return make_plan(config, CPU, None)


def encoded(plan: Plan) -> Encoded:
    return encode(plan, ALONE, lambda line: None)


def batches_of(plan: Plan, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Batches]]:
    """Yield (step, batches) of one rank, without an end."""
    batches = make_batches(plan, encoded(plan), dataclasses.replace(ALONE, rank=rank, world=world))
    try:
        yield from ((step, batches) for step in range(10**9))
    finally:
        batches.close()


def drawn(plan: Plan, steps: int) -> Counter[tuple[str, tuple[int, int]]]:
    """Return how often each image is drawn in each bucket."""
    found: Counter[tuple[str, tuple[int, int]]] = Counter()
    for step, batches in batches_of(plan):
        if step == steps:
            break
        batch = batches.fetch(step, 0)
        found.update((name, batch.size) for name in batch.names)
    return found


def test_each_image_is_drawn_once_per_epoch_in_each_size_that_it_is_large_enough_for(config, tmp_path: Path) -> None:
    plan = plan_of(config(tmp_path, TWO))
    assert plan.images_per_epoch == 7
    assert drawn(plan, 5 * 7) == {
        ("large.png", (64, 64)): 5, ("large.png", (96, 96)): 5, ("square.png", (64, 64)): 5,
        ("square.png", (96, 96)): 5, ("wide.png", (48, 80)): 5, ("wide.png", (80, 112)): 5, ("small.png", (64, 64)): 5,
    }  # fmt: skip


def test_a_share_is_how_often_an_epoch_draws_each_image_in_that_size(config, tmp_path: Path) -> None:
    sizes = "data.resolution=[{size: 64, share: 3}, 96]"
    plan = plan_of(config(tmp_path, sizes, "data.buckets=false", source=", repeats: 2"))
    by_size = Counter[tuple[int, int]]()
    for (_, size), count in drawn(plan, plan.images_per_epoch).items():
        by_size[size] += count
    assert by_size == {(64, 64): 4 * 2 * 3, (96, 96): 3 * 2}


def test_images_that_are_too_small_are_named_and_enlarged_when_asked(config, tmp_path: Path) -> None:
    plan = plan_of(config(tmp_path, TWO))
    left_out = "1 image (small.png) is too small for 96 px and left out of that size; data.enlarge=true enlarges them"
    assert left_out in plan.warnings
    enlarged = plan_of(config(tmp_path, TWO, "data.enlarge=true"))
    assert enlarged.images_per_epoch == 8
    assert not enlarged.warnings
    assert any("1 image is enlarged to fill the crop" in line for line in encoded(enlarged).warnings)


def test_a_single_size_enlarges_unless_told_not_to(config, tmp_path: Path) -> None:
    single, without = (plan_of(config(tmp_path, "data.resolution=96", *more)) for more in ((), ("data.enlarge=false",)))
    assert (len(single.records), len(without.records)) == (4, 3)
    assert single.sized == single.records
    assert any("small.png) is too small for every size and not used at all" in line for line in without.warnings)


def test_a_size_without_images_is_refused(config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.resolution: all images are too small for 256 px, such as large\.png"):
        plan_of(config(tmp_path, "data.resolution=[64, 256]"))
    with pytest.raises(UserError, match=r"all images are too small for 256 px"):
        forecast_inputs(config(tmp_path, "data.resolution=[64, 256]"), torch.float32)


@pytest.mark.parametrize(
    ("overrides", "source", "key"),
    [(("data.resolution=[64, 2048]",), "", r"data\.resolution"), ((), ", resolution: 2048", r"data\.sources\.0\.reso")],
)
def test_the_size_that_the_position_grid_lacks_is_named(config, tmp_path: Path, overrides, source, key) -> None:
    with pytest.raises(UserError, match=rf"^{key}.*: 2048 is too large for this base; at most 1536"):
        plan_of(config(tmp_path, *overrides, source=source))


@pytest.mark.parametrize("side", [64, 96])
def test_each_size_has_images_shift_weights_and_positions_of_a_run_of_its_own(config, tmp_path: Path, side) -> None:
    mixed = plan_of(config(tmp_path, TWO, *BY_SIZE))
    alone = plan_of(config(tmp_path, f"data.resolution={side}", "data.enlarge=false", *BY_SIZE))
    assert mixed.shifts[side, side] == alone.shift
    objectives = [make_objective(plan.config.flow, plan.shift, plan.shifts) for plan in (mixed, alone)]
    models = (
        load_base(mixed),
        load_transformer(alone.base, alone.dtype),
    )  # with its crops cached, and as diffusers has it
    compared = 0
    for (step, one), (_, other) in zip(batches_of(mixed), batches_of(alone), strict=False):
        ours, theirs = one.fetch(step, 0), other.fetch(step, 0)
        models[0].pos_embed(ours.latents)  # each size in turn
        if ours.size == (side, side):
            assert torch.equal(ours.sigma, theirs.sigma)
            assert torch.equal(ours.noise, theirs.noise)
            weights = [objective.weight_at(ours.size)(ours.sigma) for objective in objectives]
            assert torch.equal(*weights)
            assert torch.equal(models[0].pos_embed(ours.latents), models[1].pos_embed(ours.latents))
            compared += 1
        if compared == 3:
            break
    keys = [
        {key for of in encoded(plan).examples if of.size == (side, side) for key in of.images}
        for plan in (mixed, alone)
    ]
    assert keys[0] == keys[1]


def test_sizes_share_no_bucket() -> None:
    """So the bucket of a batch tells its size."""
    tables = [bucket_table(side) for side in range(16, 4097, 16)]
    assert len({size for table in tables for size in table}) == sum(map(len, tables))


def test_two_ranks_draw_what_one_draws_in_batches_of_one_size(config, tmp_path: Path) -> None:
    def names(rank: int, world: int, batch: int) -> list[list[str]]:
        plan = plan_of(config(tmp_path, TWO, f"train.batch_size={batch}"))
        found = []
        for step, batches in batches_of(plan, rank, world):
            if step == 8:
                return found
            batch_of_step = batches.fetch(step, 0)
            found.append([f"{name} {batch_of_step.size}" for name in batch_of_step.names])
        raise AssertionError

    whole, first, second = names(0, 1, 2), names(0, 2, 1), names(1, 2, 1)
    assert [one + other for one, other in zip(first, second, strict=True)] == whole
    assert len({name for batch in whole for name in batch}) == 7


def test_captions_stay_with_their_images_in_every_size(config, tmp_path: Path) -> None:
    plan = plan_of(config(tmp_path, TWO))
    data = encoded(plan)
    captions = {data.captions["clip_l"][f"a {name} picture"]: f"{name}.png" for name in PHOTOS}
    assert [captions[example.captions["clip_l"]] for example in data.examples] == [one.name for one in data.examples]


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two sizes with a preview and held-out images."""
    run = tmp_path_factory.mktemp("runs") / "sizes"
    run_training(config(run, *RUN))
    return run


RUN = (
    TWO, "train.steps=6", "checkpoint.every=2", "data.caption_dropout=0.3", "flow.shift=resolution",
    "preview={prompts: [a dog], every: 6, steps: 1}", "validation={holdout: 1, every: 6}",
)  # fmt: skip


def test_a_run_stopped_and_resumed_equals_one_never_stopped(
    config, finished: Path, tmp_path: Path, assert_equal_runs
) -> None:
    def stop(view: View) -> None:
        if view.step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_training(config(tmp_path, *RUN), callbacks=[stop])
    run_training(config(tmp_path, *RUN), resume=True)
    assert_equal_runs(finished, tmp_path)


def test_the_result_says_which_sizes_it_was_trained_on(finished: Path) -> None:
    adapter = read_adapter(finished)
    assert (adapter.contract["resolution"], adapter.contract["resolutions"]) == (96, [64, 96])
    assert adapter.contract["shift"] == pytest.approx(3 * 96 / 1024)
    assert adapter.metadata["modelspec.resolution"] == "96x96"
    card = (finished / "README.md").read_text()
    assert "| resolution | 64, 96 px, aspect buckets |" in card
    assert " at 64 to 96 px, " in card
    with Image.open(next((finished / "samples").glob("step-*.png"))) as preview:
        assert preview.size == (96, 96)


def test_held_out_images_have_the_largest_size_that_fits(config, photos: Path, tmp_path: Path) -> None:
    plan = plan_of(config(tmp_path, TWO, f"validation.holdout={photos}"))
    sizes = {one.name: one.size for one in encoded(plan).holdout}
    assert sizes == {"large.png": (96, 96), "square.png": (96, 96), "wide.png": (80, 112), "small.png": (64, 64)}


def test_a_source_may_have_sizes_of_its_own(config, quick_config, photos: Path, tmp_path: Path) -> None:
    sources = f"data.sources=[{{path: {photos}, resolution: 96}}, {{path: {photos}}}]"
    plan = plan_of(quick_config(tmp_path, sources, "data.buckets=false"))
    assert Counter(example.size for example in encoded(plan).examples) == {(96, 96): 3, (64, 64): 4}
    assert plan.config.data.side == 96
    alone = plan_of(config(tmp_path, source=", resolution: 96"))
    assert alone.buckets == plan_of(config(tmp_path, "data.resolution=96")).buckets


def test_a_list_with_one_size_is_that_size(config, tmp_path: Path) -> None:
    one, other = (plan_of(config(tmp_path, f"data.resolution={size}")) for size in ("96", "[96]"))
    assert (one.buckets, one.sized, one.shifts) == (other.buckets, other.sized, other.shifts)
    assert describe(one, 1) == describe(other, 1)


def test_epochs_count_every_size(config, tmp_path: Path) -> None:
    plan = plan_of(config(tmp_path, TWO, "train.steps=null", "train.epochs=2"))
    assert plan.config.train.steps == 14
    lines = describe(plan, 1)
    assert any(line.startswith("data      4 images, 64 and 96 px, 7 per epoch") for line in lines)
    assert any(line.endswith("2 epochs: each image is seen 2 to 4 times") for line in lines)


def test_the_plan_has_the_memory_of_the_largest_size_and_the_time_of_the_mix(config, tmp_path: Path) -> None:
    squares = "data.buckets=false"
    mixed, small, large = (
        forecast(forecast_inputs(config(tmp_path, sizes, squares, "data.enlarge=false"), torch.float32))
        for sizes in ("data.resolution=[{size: 64, share: 2}, 96]", "data.resolution=64", "data.resolution=96")
    )
    assert mixed.training == large.training
    assert mixed.flops == (8 * small.flops + 3 * large.flops) / 11
    assert mixed.store.images == small.store.images + large.store.images
    assert "data.resolution=[64]" in [typed for typed, _ in knobs(mixed.inputs)]


def test_less_memory_means_leaving_out_the_largest_size(config, tmp_path: Path) -> None:
    plan = plan_of(config(tmp_path, TWO, "train.gradient_checkpointing=block", "model.quantize=nf4"))
    assert "data.resolution=[64]" in training_knob(plan.config.model_copy(), plan.method, 2)


def test_class_images_are_drawn_and_read_in_each_size(config, quick_config, photos: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for side in (70, 100):
        Image.new("RGB", (side, side), "teal").save(own / f"{side}.png")
    prior = f", prior: {{prompt: a toy, images: 6, steps: 1, path: {own}}}"
    plan = plan_of(config(tmp_path, TWO, source=prior))
    (planned,) = plan.priors
    assert [(record.image.name, record.sizes) for record in planned.own] == [
        ("100.png", ((64, 64), (48, 80))), ("100.png", ((96, 96), (80, 112))), ("70.png", ((64, 64), (48, 80))),
    ]  # fmt: skip
    assert {drawn.size for drawn in planned.drawn} == {(48, 80), (80, 112), (96, 96)}
    assert planned.count == 2 + len(planned.drawn)
    for example in encoded(plan).examples:
        assert {of.size for of in example.prior.pools[example.size]} == {example.size}


def test_the_check_shows_every_size(config, tmp_path: Path, capsys) -> None:
    run_data_check(config(tmp_path, TWO), tmp_path / "sheet.png")
    shown = capsys.readouterr().out
    assert "trainable: 4 images, 7 per epoch" in shown
    assert "warning: 1 image (small.png) is too small for 96 px" in shown
    assert "128 x 128             1   64 x 64" in shown
    assert "128 x 128             1   96 x 96" in shown


def test_a_source_whose_images_are_all_too_small_needs_no_class_images(quick_config, photos: Path, tmp_path) -> None:
    for name, side in (("tiny", 32), ("own", 100)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (side, side), "teal").save(tmp_path / name / "one.png")
    prior = f"prior: {{prompt: a toy, images: 0, path: {tmp_path}/own}}"
    sources = f"data.sources=[{{path: {photos}}}, {{path: {tmp_path}/tiny, caption: a toy, {prior}}}]"
    plan = plan_of(quick_config(tmp_path / "run", sources, TWO))
    assert not plan.priors
    assert any("one.png) is too small for every size and not used at all" in line for line in plan.warnings)

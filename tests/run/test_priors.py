"""Class images: those that are lacking are drawn, in the right shapes, once, by the sampler that `infer` uses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.errors import UserError
from sd3tune.forecast.forecast import forecast_inputs
from sd3tune.inference.job import InferenceJob
from sd3tune.run import drawing
from sd3tune.run.describe import describe
from sd3tune.run.encoding import encode
from sd3tune.run.preflight import make_plan
from sd3tune.run.priors import _without, shares
from sd3tune.runtime.processes import ALONE, Processes

PRIOR = "{{prompt: a toy, images: {images}, steps: 2, guidance: 3, weight: {weight}, path: {path}}}"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three square pictures and one that is twice as wide as high."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (80, 80), (96, 96), (128, 64)]):
        Image.new("RGB", size, (50 * number, 90, 200)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def config(quick_config, photos: Path, tmp_path: Path):
    """`config("key=value", images=4, weight=1.0, path="null")`: a run on the photos with a prior."""

    def make(*overrides: str, images: int = 4, weight: float = 1.0, path: object = "null"):
        prior = PRIOR.format(images=images, weight=weight, path=path)
        source = f"data.sources=[{{path: {photos}, caption: a sks toy, prior: {prior}}}]"
        return quick_config(tmp_path / "run", source, f"data.cache_dir={tmp_path / 'store'}", *overrides)

    return make


def plan_of(config):
    return make_plan(config, torch.device("cpu"), resume=None)


def drawn_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def encoded(config, processes: Processes = ALONE):
    return encode(plan_of(config), processes, lambda line: None)


def test_what_is_lacking_is_drawn_in_the_shapes_of_the_buckets(config, tmp_path: Path) -> None:
    plan = plan_of(config())
    assert "prior     4 class images, 'a toy', 4 of them to be drawn first" in describe(plan, 1)
    examples = encoded(config()).examples
    sizes = {Image.open(path).size for path in (tmp_path / "store" / "class-images").glob("*.png")}
    assert sizes == {(64, 64), (80, 48)}
    for example in examples:
        pool = example.prior.pools[example.size]
        assert {picture.size for picture in pool} == {example.size}
        assert {tuple(picture.captions.values()) for picture in pool} != {tuple(example.captions.values())}
    assert [len(pool) for pool in examples[0].prior.pools.values()] == [3, 1]
    assert "prior     4 class images, 'a toy'" in describe(plan_of(config()), 1)
    kept = plan_of(config("data.sources.0.prior={kind: prediction, prompt: a toy}"))
    assert "prior     the base's own prediction, 'a toy'" in describe(kept, 1)


def test_a_class_image_is_what_infer_draws(config, tmp_path: Path) -> None:
    asked = config("data.sources.0.prior.prompt=[a doll, a toy]")
    plan = plan_of(asked)
    encoded(asked)
    drawn = next(of for of in plan.priors[0].drawn if of.size == (48, 80))
    assert drawn.prompt == "a toy"
    model = tmp_path / "model.yaml"
    model.write_text(f"{{data: {{sources: [{{path: {tmp_path}}}]}}, model: {{base: tiny, max_sequence_length: 16}}}}")
    settings = {"seed": drawn.seed, "steps": 2, "guidance": 3.0, "size": (80, 48)}
    (written,) = run_infer(
        InferenceJob.from_fields(loras=[], prompt="a toy", out=tmp_path / "out", config=model, **settings)
    )
    assert np.array_equal(np.asarray(Image.open(written)), np.asarray(Image.open(drawn.path)))


def test_what_was_drawn_before_a_stop_is_not_drawn_again(config, tmp_path: Path, monkeypatch) -> None:
    folder, genuine, calls = tmp_path / "store" / "class-images", drawing.to_image, []

    def to_image(vae, latents):
        calls.append(latents)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(vae, latents)

    monkeypatch.setattr(drawing, "to_image", to_image)
    with pytest.raises(KeyboardInterrupt):
        encoded(config())
    before = drawn_in(folder)
    assert len(before) == 2
    encoded(config())
    assert len(calls) == 5  # two, the one that was interrupted, and two more
    after = drawn_in(folder)
    assert len(after) == 4
    assert before.items() <= after.items()


def test_processes_draw_a_share_each_and_together_what_one_draws(config, tmp_path: Path) -> None:
    folder, found = tmp_path / "store" / "class-images", encoded(config())
    alone = drawn_in(folder)
    for path in folder.glob("*.png"):
        path.unlink()
    plan, counts = plan_of(config()), []
    for rank in range(2):
        processes = Processes(rank, 2, lambda tensor: tensor, lambda tensor: tensor[None], lambda: None)
        drawing.draw_class_images(plan, found.store, found.captions, processes)
        counts.append(len(drawn_in(folder)))
    assert counts == [2, 4]
    assert drawn_in(folder) == alone


def test_ones_own_class_images_keep_their_captions_and_are_completed(config, tmp_path: Path) -> None:
    own = tmp_path / "class"
    own.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (200, 60 * number, 0)).save(own / f"own{number}.png")
    (own / "own0.txt").write_text("a wooden toy")
    plan = plan_of(config(path=own))
    (prior,) = plan.priors
    assert [record.caption for record in prior.own] == ["a wooden toy", "a toy"]
    assert sorted(of.size for of in prior.drawn) == [(48, 80), (64, 64)]
    encoded(config(path=own))
    assert len(list(own.glob("*.png"))) == 4
    again = plan_of(config(path=own)).priors[0]
    assert again.own == prior.own
    assert not again.missing


def test_another_prompt_takes_nothing_that_was_drawn_for_the_first(config) -> None:
    encoded(config())
    other = plan_of(config("data.sources.0.prior.prompt=a doll")).priors[0]
    assert len(other.missing) == 4


def test_more_class_images_leave_a_smaller_set_as_it_was(config) -> None:
    encoded(config(images=8))
    few = plan_of(config(images=4)).priors[0]
    assert not few.missing
    assert len(few.records) == 4


def test_several_prompts_are_drawn_in_turns_and_trained_under_their_own(config) -> None:
    toys = ["a toy", "a doll", "a red ball"]
    asked = config(f"data.sources.0.prior.prompt={toys}", images=8)
    plan = plan_of(asked)
    (prior,) = plan.priors
    line = "prior     8 class images, 'a toy', 'a doll', 'a red ball', 8 of them to be drawn first"
    assert line in describe(plan, 1)
    assert sorted(Counter(of.prompt for of in prior.drawn).values()) == [2, 3, 3]
    assert len({of.path for of in prior.drawn}) == len({of.seed for of in prior.drawn}) == 8
    found = encoded(asked)
    pools = found.examples[0].prior.pools
    for drawn in prior.drawn:
        (example,) = (of for of in pools[drawn.size] if of.name == drawn.path.name)
        assert example.captions == {encoder: keys[drawn.prompt] for encoder, keys in found.captions.items()}
    alone = plan_of(config()).priors[0]
    assert alone.missing == [alone.drawn[2]]  # of three squares and one wide of "a toy", the list had one square less


def test_weight_zero_draws_nothing_and_ends_in_the_same_adapter(config, tmp_path: Path, adapter_of) -> None:
    run_training(config("data.sources.0.prior=null"))
    expected = adapter_of(tmp_path / "run")
    run_training(config(f"output_dir={tmp_path / 'zero'}", weight=0))
    assert not (tmp_path / "store" / "class-images").exists()
    found = adapter_of(tmp_path / "zero")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    run_training(config(f"output_dir={tmp_path / 'one'}"))
    assert any(not torch.equal(adapter_of(tmp_path / "one")[name], tensor) for name, tensor in expected.items())


def test_metrics_hold_the_loss_of_the_class(config, tmp_path: Path, lines_of) -> None:
    run_training(config("train.batch_size=2", weight=0.5))
    for line in lines_of(tmp_path / "run"):
        instances = line["loss"] - 0.5 * line["prior_loss"]
        by_sigma = line["loss_by_sigma"].values()
        assert min(by_sigma) - 1e-5 <= instances <= max(by_sigma) + 1e-5


@pytest.mark.parametrize("kind", ["images", "prediction"])
def test_a_run_with_a_prior_resumes_exactly(config, tmp_path: Path, assert_equal_runs, kind: str) -> None:
    settings = ["train.steps=4", "checkpoint.every=2", "train.gradient_accumulation=2", "data.caption_dropout=0.3"]
    if kind == "prediction":
        settings.append("data.sources.0.prior={kind: prediction, prompt: a toy}")

    def stop(view) -> None:
        if view.step == 3:
            raise InterruptedError

    run_training(config(*settings, f"output_dir={tmp_path / 'straight'}"))
    with pytest.raises(InterruptedError):
        run_training(config(*settings), callbacks=[stop])
    run_training(config(*settings), resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


WITHOUT = "data.sources.0.prior={kind: prediction, prompt: a toy, captions_without: sks}"


def test_captions_without_the_name_are_preserved_too(config, photos: Path, tmp_path: Path) -> None:
    (photos / "0.txt").write_text("SKS, a toy on a table")
    (photos / "1.txt").write_text("a toy without its name")
    planned = plan_of(config(WITHOUT))
    wanted = ["a toy", "a toy on a table", "a toy"]
    assert planned.config.data.own_predictions[0].prompts == wanted[:2]
    run_training(config(WITHOUT, "train.steps=1"))
    kept = load_config(tmp_path / "run" / "config.yaml").config
    assert kept.data.own_predictions[0].prompts == wanted[:2]
    assert plan_of(kept).config == kept  # so a resumed run has the same prompts
    prior = encoded(config(WITHOUT)).examples[0].prior
    listed = encoded(config("data.sources.0.prior={kind: prediction, prompt: [a toy, a toy on a table]}"))
    assert prior.facts() == listed.examples[0].prior.facts()
    assert forecast_inputs(config(WITHOUT), torch.float32).config == planned.config


@pytest.mark.parametrize(
    ("caption", "rest"),
    [
        ("a photo of sks dog", "a photo of dog"),
        ("sks", ""),
        ("Sks, a dog", "a dog"),
        ("a dog, sks, on a beach", "a dog, on a beach"),
        ("a dog on a beach, sks", "a dog on a beach"),
        ("a sksy dog", None),
    ],
)
def test_only_the_name_as_a_word_is_left_out(caption: str, rest: str | None) -> None:
    assert _without(caption, "sks") == rest


def test_a_name_that_is_in_no_caption_is_one_line(config) -> None:
    with pytest.raises(
        UserError, match=r"data\.sources\.0\.prior\.captions_without: no caption of the source has 'rex'"
    ):
        plan_of(config(WITHOUT.replace("sks", "rex")))


def test_resuming_with_another_prior_is_refused(config, tmp_path: Path) -> None:
    run_training(config("train.steps=2"))
    with pytest.raises(UserError, match=r"data\.prior"):
        run_training(config("train.steps=4", weight=0.5), resume=True)


def test_a_shape_without_class_images_is_named(config, tmp_path: Path) -> None:
    own = tmp_path / "class"
    own.mkdir()
    Image.new("RGB", (64, 64)).save(own / "own.png")
    with pytest.raises(UserError, match=r"data\.sources\.0\.prior: .*no class image for the shape 80x48"):
        plan_of(config(images=0, path=own))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.sources\.0\.prior\.path: .* is a file"):
        plan_of(config(path=tmp_path / "file"))


@pytest.mark.parametrize(
    ("counts", "total", "expected"),
    [((3, 1), 4, (3, 1)), ((2, 1), 10, (7, 3)), ((99, 1), 10, (10, 1)), ((1, 1, 1), 5, (2, 2, 1)), ((5,), 0, (0,))],
)
def test_shares_are_proportional_and_leave_no_shape_out(counts, total, expected) -> None:
    shapes = {(16, 16 * (1 + number)): count for number, count in enumerate(counts)}
    assert tuple(shares(shapes, total).values()) == expected

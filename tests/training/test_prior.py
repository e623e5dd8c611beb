"""Prior preservation: each sample meets its own prompt, and the loss is the stated one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from sd3tune.data.store import Store
from sd3tune.flow.objective import velocity_target
from sd3tune.training.batches import Batch, Batches, Dropout, LatentScaling
from sd3tune.training.examples import ClassImages, Example, OwnPrediction
from sd3tune.training.step import predict_velocity, velocity_targets

SIZES = ((16, 16), (16, 16), (8, 24), (8, 24), (8, 24))
"""Of each instance, in pixels; the last has no prior. Image n holds n everywhere, its caption's embeddings hold n."""
CLASS_SIZES = {100: (16, 16), 101: (16, 16), 102: (16, 16), 200: (8, 24), 201: (8, 24)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    with store.writer() as writer:
        for number, size in [*enumerate(SIZES), *CLASS_SIZES.items(), (300, SIZES[0])]:
            mean = torch.full((4, size[0] // 8, size[1] // 8), float(number))
            writer.put(f"image-{number}", {"mean": mean, "std": torch.zeros_like(mean)})
            writer.put(f"caption-{number}", {"hidden": torch.full((3, 2), float(number))})
    return store


def example(number: int, weight: float = 1.0, prior=None) -> Example:
    size = SIZES[number] if number < len(SIZES) else CLASS_SIZES[number]
    return Example(str(number), (f"image-{number}",), {"t5": f"caption-{number}"}, size, weight, prior)


PICTURES = ClassImages(
    0, {size: [example(n, 0.5) for n, of in CLASS_SIZES.items() if of == size] for size in set(SIZES)}
)
KEPT = OwnPrediction([{"t5": "caption-300"}], weight=0.25)


def make_batches(store: Store, priors, *, batch_size=1, accumulation=1, rank=0, world=1, **more) -> Batches:
    return Batches(
        store,
        [example(number, prior=prior) for number, prior in enumerate(priors)],
        seed=3,
        batch_size=batch_size,
        accumulation=accumulation,
        rank=rank,
        world=world,
        device=torch.device("cpu"),
        scaling=LatentScaling(1.0, 0.0),
        sigma_of=lambda u, pixels: u,
        **more,
    )


def fetched(batches: Batches, steps: int) -> list[Batch]:
    found = [batches.fetch(step, micro) for step in range(steps) for micro in range(batches.accumulation)]
    batches.close()
    return found


def value(tensor: torch.Tensor) -> float:
    assert (tensor == tensor.flatten()[0]).all()
    return tensor.flatten()[0].item()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (3, 1), (2, 3)])
def test_each_sample_meets_its_own_prompt(store, batch_size, accumulation, world) -> None:
    seen: Counter[int] = Counter()
    for rank in range(world):
        options = {"batch_size": batch_size, "accumulation": accumulation, "rank": rank, "world": world}
        for batch in fetched(make_batches(store, [PICTURES] * 4 + [None], **options), 20):
            numbers = [int(name) for name in batch.names]
            instances, beside = numbers[:batch_size], numbers[batch_size:]
            assert batch.instances == batch_size
            assert all(number < 5 for number in instances)
            assert len(beside) == sum(number != 4 for number in instances)
            assert all(CLASS_SIZES[number] == SIZES[instances[0]] for number in beside)
            for row, number in enumerate(numbers):
                assert value(batch.latents[row]) == number
                assert value(batch.embeddings["t5"]["hidden"][row]) == number
            assert batch.weights.tolist() == [1.0] * batch_size + [0.5] * len(beside)
            assert batch.kept == slice(len(numbers), len(numbers))
            assert len(set(batch.sigma.tolist())) == len(numbers)  # a noise level of its own each
            seen.update(beside)
    assert set(seen) == set(CLASS_SIZES)


def test_class_images_are_seen_equally_often(store) -> None:
    batches = make_batches(store, [PICTURES] * 2, batch_size=2)  # one bucket, so every class image of it in turn
    seen = Counter(name for batch in fetched(batches, 30) for name in batch.names[2:])
    assert seen == {"100": 20, "101": 20, "102": 20}


def test_instances_are_the_same_with_and_without_a_prior(store) -> None:
    plain, preserved = (make_batches(store, [prior] * 5, batch_size=2) for prior in (None, PICTURES))
    for one, other in zip(fetched(plain, 12), fetched(preserved, 12), strict=True):
        instances = other.rows(slice(other.instances))
        assert instances.names == one.names
        assert torch.equal(instances.noise, one.noise)
        assert torch.equal(instances.sigma, one.sigma)
        assert torch.equal(instances.latents, one.latents)


def test_what_is_to_be_kept_is_the_same_noisy_image_under_the_class_caption(store) -> None:
    for batch in fetched(make_batches(store, [KEPT] * 5, batch_size=2), 12):
        assert batch.kept == slice(2, 4)
        assert batch.names[2:] == batch.names[:2]
        for of in (batch.latents, batch.noise, batch.sigma):
            assert torch.equal(of[2:], of[:2])
        assert value(batch.embeddings["t5"]["hidden"][2:]) == 300
        assert batch.weights.tolist() == [1.0, 1.0, 0.25, 0.25]


@pytest.mark.parametrize(("caption", "encoder"), [(1.0, 0.0), (0.0, 1.0), (0.6, 0.3)])
@pytest.mark.parametrize("prior", [KEPT, PICTURES])
def test_a_kept_sample_never_loses_its_caption(store, caption: float, encoder: float, prior) -> None:
    """Else it is an instance's input, with another target. Class images are trained on the true velocity, as those."""
    empty = {"t5": "caption-100"}
    batches = make_batches(store, [prior] * 5, batch_size=2, dropout=Dropout(caption, encoder, empty))
    lost = {"instances": 0, "beside": 0}
    for batch in fetched(batches, 12):
        read = [value(of) for of in batch.embeddings["t5"]["hidden"]]
        lost["instances"] += sum(found != int(name) for found, name in zip(read[:2], batch.names[:2], strict=True))
        own = [300.0] * 2 if prior is KEPT else [float(name) for name in batch.names[2:]]
        lost["beside"] += sum(found != wanted for found, wanted in zip(read[2:], own, strict=True))
    assert lost["instances"] > 8
    assert (lost["beside"] == 0) is (prior is KEPT)


def test_a_run_of_before_goes_on_dropping_what_it_dropped(store) -> None:
    dropout = Dropout(1.0, 0.0, {"t5": "caption-100"}, kept=True)
    for batch in fetched(make_batches(store, [KEPT] * 5, batch_size=2, dropout=dropout), 4):
        assert value(batch.embeddings["t5"]["hidden"]) == 100


def test_class_captions_are_kept_equally_often_and_apart_from_the_images(store) -> None:
    kept = OwnPrediction([{"t5": f"caption-{number}"} for number in CLASS_SIZES], weight=1.0)
    seen: Counter[tuple[str, float]] = Counter()
    for batch in fetched(make_batches(store, [kept] * 2, batch_size=2), 25):
        captions = batch.embeddings["t5"]["hidden"][2:, 0, 0].tolist()
        seen.update(zip(batch.names[2:], captions, strict=True))
    assert len(seen) == 2 * len(CLASS_SIZES)
    by_caption = Counter[float]()
    for (_, caption), count in seen.items():
        by_caption[caption] += count
    assert by_caption == dict.fromkeys(CLASS_SIZES, 10)


def test_both_kinds_stand_side_by_side(store) -> None:
    batches = make_batches(store, [PICTURES, KEPT], batch_size=2)
    for batch in fetched(batches, 12):
        pictures = batch.names[:2].count("0")
        assert batch.kept == slice(2 + pictures, 4)
        assert all(int(name) >= 100 for name in batch.names[2 : 2 + pictures])
        assert batch.names[2 + pictures :] == ["1"] * (2 - pictures)


def test_the_names_of_a_step_are_those_of_its_batches(store) -> None:
    priors = [PICTURES] * 4 + [None]
    options = {"batch_size": 2, "accumulation": 2, "world": 2}
    ranks = [make_batches(store, priors, rank=rank, **options) for rank in range(2)]
    for step in range(6):
        found = [of.fetch(step, micro) for of in ranks for micro in range(2)]
        expected = [name for batch in found for name in batch.names[:2]]
        expected += [name for batch in found for name in batch.names[2:]]
        assert ranks[0].names(step) == ranks[1].names(step) == expected
    for batches in ranks:
        batches.close()


SOURCE = "data.sources=[{{path: {path}, prior: {prior}}}]"


@pytest.fixture
def start(assembled, quick_config, tiny_images: Path, tmp_path: Path):
    """`start(prior, "key=value", ...)`: a training on square pictures with that prior."""

    def make(prior: str, *overrides: str):
        source = SOURCE.format(path=tiny_images, prior=prior)
        return assembled(quick_config(tmp_path / "run", "data.buckets=false", source, *overrides))

    return make


CLASS = "{{prompt: a toy, images: 3, steps: 2, weight: {weight}}}"
PREDICTION = "{{kind: prediction, prompt: a toy, weight: {weight}}}"


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_gradient_is_that_of_the_mean_over_instances_plus_the_weighted_mean_over_the_class(
    start, batch_size: int
) -> None:
    training = start(CLASS.format(weight=0.7), f"train.batch_size={batch_size}", "train.max_grad_norm=null")
    batch = training.batches.fetch(0, 0)
    assert len(batch.names) == 2 * batch_size
    velocity = predict_velocity(training.transformer, training.method, batch)
    errors = (velocity - (batch.noise - batch.latents)).pow(2)
    (errors[:batch_size].mean() + 0.7 * errors[batch_size:].mean()).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in training.parameters.values()])
    for parameter in training.parameters.values():
        parameter.grad = None
    result = training.step()
    torch.testing.assert_close(result.grad_norm, expected.norm(), rtol=1e-5, atol=0)
    assert result.prior.shape == (3, batch_size)
    assert not result.prior.isnan().any()


@pytest.mark.parametrize("prior", [CLASS, PREDICTION], ids=["images", "prediction"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_weight_zero_trains_as_without_a_prior_and_skips_the_work(start, prior, accumulation) -> None:
    overrides = ("train.batch_size=2", f"train.gradient_accumulation={accumulation}")
    plain, weightless = (start(of, *overrides) for of in ("null", prior.format(weight=0)))
    assert not weightless.batches.with_prior
    assert not weightless.plan.priors
    for _ in range(2):
        expected, found = plain.step(), weightless.step()
        assert torch.equal(found.grad_norm, expected.grad_norm)
        assert torch.equal(found.weighted, expected.weighted)
        assert found.prior.shape == (3, 0)
    assert torch.equal(weightless.state.master.master, plain.state.master.master)


def test_kept_samples_are_to_be_predicted_as_the_base_does(start) -> None:
    training = start(PREDICTION.format(weight=1), "train.batch_size=2")
    for _ in range(3):  # so that the adapter differs from nothing
        training.step()
    batch = training.batches.fetch(5, 0)
    with torch.no_grad():
        targets = velocity_targets(training.transformer, training.method, batch)
        with training.method.disabled(training.transformer):
            base = predict_velocity(training.transformer, training.method, batch.rows(batch.kept))
        adapted = predict_velocity(training.transformer, training.method, batch.rows(batch.kept))
    assert torch.equal(targets[:2], velocity_target(batch.latents, batch.noise)[:2])
    assert torch.equal(targets[batch.kept], base)
    assert not torch.equal(adapted, base)


def test_before_the_first_step_there_is_nothing_to_restore(start) -> None:
    """B = 0: the adapter predicts what the base does, so the loss of the kept samples is none."""
    result = start(PREDICTION.format(weight=1), "train.batch_size=2").step()
    assert result.prior[0].max() < 1e-9  # other than 0, as a batch of four rounds otherwise than one of two
    assert (result.losses > 0).all()

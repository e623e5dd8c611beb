"""One of several captions a step: which one, with which picture, on which rank."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from sd3tune.data.store import Store
from sd3tune.training.batches import Batch, Batches, Dropout, LatentScaling
from sd3tune.training.examples import Example, OwnPrediction, Sample

SIZES = ((16, 16), (8, 24), (16, 16), (8, 24), (8, 24))
"""The size of each image, in pixels. Image n holds 10 n everywhere; its caption c has embeddings of 10 n + c + 1."""
CAPTIONS = 3
ENCODERS = ("clip_l", "clip_g", "t5")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    with store.writer() as writer:
        for image, size in enumerate(SIZES):
            mean = torch.full((4, size[0] // 8, size[1] // 8), 10.0 * image)
            writer.put(f"image-{image}", {"mean": mean, "std": torch.zeros_like(mean)})
        for image, caption in [*((image, c) for image in range(len(SIZES)) for c in range(CAPTIONS)), (9, 8)]:
            for encoder in ENCODERS:
                entry = {"hidden": torch.full((3, 2), 10.0 * image + caption + 1)}
                pooled = {} if encoder == "t5" else {"pooled": torch.full((5,), 10.0 * image + caption + 1)}
                writer.put(f"{encoder}-{image}-{caption}", entry | pooled)
    return store


def keys(image: int, caption: int) -> dict[str, str]:
    return {encoder: f"{encoder}-{image}-{caption}" for encoder in ENCODERS}


def example(image: int, captions: int = CAPTIONS, prior=None) -> Example:
    choices = tuple(keys(image, caption) for caption in range(captions))
    return Example(
        str(image), (f"image-{image}",), choices[0], SIZES[image], prior=prior, choices=choices[captions == 1 :]
    )


def make_batches(store: Store, examples, *, batch_size=1, accumulation=1, rank=0, world=1, seed=3, **more) -> Batches:
    return Batches(
        store, examples, seed=seed, batch_size=batch_size, accumulation=accumulation, rank=rank, world=world,
        device=torch.device("cpu"), scaling=LatentScaling(1.0, 0.0), sigma_of=lambda u, pixels: u, **more,
    )  # fmt: skip


def fetched(batches: Batches, steps: int) -> list[Batch]:
    found = [batches.fetch(step, micro) for step in range(steps) for micro in range(batches.accumulation)]
    batches.close()
    return found


def drawn(batch: Batch) -> list[int]:
    """The embeddings' values, which all encoders share."""
    of = [tensor.flatten(1) for entry in batch.embeddings.values() for tensor in entry.values()]
    assert all(torch.equal(tensor, of[0][:, :1].expand_as(tensor)) for tensor in of)
    return [int(value) for value in of[0][:, 0]]


EVERY = [example(image) for image in range(len(SIZES))]


@pytest.mark.parametrize("world", [1, 2])
def test_a_picture_has_one_of_its_own_captions_in_all_encoders(store, world) -> None:
    seen = set()
    for rank in range(world):
        for batch in fetched(make_batches(store, EVERY, batch_size=2, rank=rank, world=world), 30):
            for name, latent, value in zip(batch.names, batch.latents, drawn(batch), strict=True):
                assert (latent == 10 * int(name)).all()
                assert value // 10 == int(name)
                seen.add(value)
    assert seen == {10 * image + caption + 1 for image in range(len(SIZES)) for caption in range(CAPTIONS)}


def test_captions_are_equally_likely_and_draws_independent() -> None:
    sample = [Sample(EVERY[0], slot) for slot in range(2)]
    pairs = Counter(tuple(one.captions(5, step)["t5"][-1] for one in sample) for step in range(4500))
    expected = 4500 / CAPTIONS**2
    assert len(pairs) == CAPTIONS**2
    assert sum((count - expected) ** 2 / expected for count in pairs.values()) < 26.2  # 8 degrees of freedom: 0.1 %
    following = Counter((sample[0].captions(5, n)["t5"], sample[0].captions(5, n + 1)["t5"]) for n in range(4500))
    assert sum((count - expected) ** 2 / expected for count in following.values()) < 26.2


def test_two_processes_and_micro_steps_draw_what_one_draws(store) -> None:
    one = fetched(make_batches(store, EVERY, batch_size=4), 8)
    ranks = [fetched(make_batches(store, EVERY, batch_size=2, rank=rank, world=2), 8) for rank in (0, 1)]
    for whole, *halves in zip(one, *ranks, strict=True):
        assert [value for half in halves for value in drawn(half)] == drawn(whole)
    squares = [EVERY[0], EVERY[2]]  # buckets change between micro-steps
    whole = fetched(make_batches(store, squares, batch_size=4), 8)
    cut = fetched(make_batches(store, squares, batch_size=2, accumulation=2), 8)
    assert [drawn(batch) for batch in whole] == [drawn(a) + drawn(b) for a, b in zip(cut[::2], cut[1::2], strict=True)]


def test_a_step_draws_alike_whatever_came_before_it(store) -> None:
    in_order = fetched(make_batches(store, EVERY, batch_size=2), 6)
    jumping = make_batches(store, EVERY, batch_size=2)
    for step in (4, 0, 5, 4):
        assert drawn(jumping.fetch(step, 0)) == drawn(in_order[step])
    jumping.close()


def test_a_look_ahead_reads_the_step_s_own_captions(store) -> None:
    batches = make_batches(store, EVERY, batch_size=2)
    for step in range(8):
        _, pooled = batches.conditions(step, 0)
        assert torch.equal(pooled["clip_g"]["pooled"], batches.fetch(step, 0).embeddings["clip_g"]["pooled"])
    batches.close()


def test_all_else_is_as_with_one_caption(store) -> None:
    """Order, noise and sigma do not depend on the number of captions, nor does dropout."""
    empty = keys(9, 8)
    settings = {"batch_size": 2, "dropout": Dropout(caption=0.3, encoder=0.2, empty=empty)}
    single = [example(image, captions=1) for image in range(len(SIZES))]
    assert not any(one.choices for one in single)
    one, several = (fetched(make_batches(store, examples, **settings), 12) for examples in (single, EVERY))
    for a, b in zip(one, several, strict=True):
        assert a.names == b.names
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.sigma, b.sigma)
        for encoder in ENCODERS:
            before, after = (batch.embeddings[encoder]["hidden"][:, 0, 0] for batch in (a, b))
            assert torch.equal(before == 99, after == 99)
            assert torch.equal(before == 0, (after == 0))


def test_the_base_s_own_prediction_has_the_caption_of_the_class(store) -> None:
    examples = [example(image, prior=OwnPrediction([keys(9, 8)], 1.0)) for image in range(len(SIZES))]
    for batch in fetched(make_batches(store, examples, batch_size=2), 10):
        assert [value == 99 for value in drawn(batch)] == [False, False, True, True]

"""What a step sees: pairs that belong together, the same for any number of processes, without hidden state."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sd3tune.data.sampler import index_at, uniform
from sd3tune.data.store import Store
from sd3tune.model.load.components import load_text_encoder, load_vae
from sd3tune.run.batches import make_batches as make_run_batches
from sd3tune.runtime.processes import ALONE
from sd3tune.training.batches import Batch, Batches, Dropout, LatentScaling
from sd3tune.training.examples import Example

IMAGES, VARIANTS = 5, 4
ONE_SIZE = ((16, 16),) * IMAGES
MIXED = ((16, 16), (8, 24), (16, 16), (24, 8), (8, 24))
"""The size of each image, in pixels: two in one bucket, two in another, one alone."""
ENCODERS = ("clip_l", "clip_g", "t5")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Image n has the mean 10 n + variant everywhere and no spread; its caption's embeddings are all n + 1.

    Each is there in both sizes, under `image-size-n-variant`. The empty caption's embeddings are all 99.
    """
    store = Store(tmp_path_factory.mktemp("store"))
    with store.writer() as writer:
        for image in range(IMAGES):
            for size in {ONE_SIZE[image], MIXED[image]}:
                for variant in range(VARIANTS):
                    mean = torch.full((4, size[0] // 8, size[1] // 8), 10.0 * image + variant)
                    writer.put(f"image-{size}-{image}-{variant}", {"mean": mean, "std": torch.zeros_like(mean)})
        for caption, value in [*((str(image), image + 1.0) for image in range(IMAGES)), ("empty", 99.0)]:
            for encoder in ENCODERS:
                entry = {"hidden": torch.full((3, 2), value)}
                pooled = {} if encoder == "t5" else {"pooled": torch.full((5,), value)}
                writer.put(f"{encoder}-{caption}", entry | pooled)
    return store


def make_batches(
    store: Store, *, batch_size=1, accumulation=1, rank=0, world=1, repeats=(1,) * IMAGES, seed=7, sizes=ONE_SIZE,
    weights=(1.0,) * IMAGES, **options,
):  # fmt: skip
    examples = [
        Example(
            f"{image}.png",
            tuple(f"image-{sizes[image]}-{image}-{variant}" for variant in range(VARIANTS)),
            {encoder: f"{encoder}-{image}" for encoder in ENCODERS},
            sizes[image],
            weights[image],
        )
        for image in range(IMAGES)
        for _ in range(repeats[image])
    ]
    return Batches(
        store, examples, seed=seed, batch_size=batch_size, accumulation=accumulation, rank=rank, world=world,
        device=torch.device("cpu"), scaling=LatentScaling(1.0, 0.0), **{"sigma_of": lambda u, pixels: u, **options},
    )  # fmt: skip


def images_of(batch: Batch) -> list[int]:
    return [int(name.removesuffix(".png")) for name in batch.names]


def fetch_all(batches: Batches, steps: int) -> list[Batch]:
    found = [batches.fetch(step, micro) for step in range(steps) for micro in range(batches.accumulation)]
    batches.close()
    return found


@pytest.mark.parametrize("sizes", [ONE_SIZE, MIXED], ids=["squares", "buckets"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (3, 1), (2, 2)])
def test_latents_keep_their_captions_when_shuffled(store, world, batch_size, accumulation, sizes) -> None:
    repeats, steps = (1, 2, 1, 3, 1), 24
    seen: Counter[int] = Counter()
    variants = set()
    for rank in range(world):
        batches = make_batches(
            store,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world=world,
            repeats=repeats,
            sizes=sizes,
        )
        for batch in fetch_all(batches, steps):
            for row, image in enumerate(images_of(batch)):
                latent = batch.latents[row]
                assert torch.equal(latent, torch.full_like(latent, latent.flatten()[0].item()))
                assert int(latent.flatten()[0]) // 10 == image
                assert latent.shape[1:] == (sizes[image][0] // 8, sizes[image][1] // 8)
                variants.add(int(latent.flatten()[0]) % 10)
                for encoder in ENCODERS:
                    for tensor in batch.embeddings[encoder].values():
                        assert (tensor[row] == image + 1).all()
                seen[image] += 1
    assert variants == set(range(VARIANTS))
    epochs = steps * batch_size * accumulation * world / sum(repeats)
    waiting = world * batch_size if sizes is MIXED else 0  # what does not fill a batch yet
    for image, count in seen.items():
        assert abs(count - epochs * repeats[image]) <= repeats[image] + waiting


def test_each_sample_has_the_weight_of_its_example(store) -> None:
    batches = make_batches(store, batch_size=2, sizes=MIXED, weights=tuple(1.0 + image for image in range(IMAGES)))
    for batch in fetch_all(batches, 10):
        assert batch.weights.dtype == torch.float32
        assert batch.weights.tolist() == [1.0 + image for image in images_of(batch)]


@pytest.mark.parametrize(("buckets", "world"), [(False, 1), (True, 2)], ids=["squares", "buckets on two ranks"])
def test_encoded_pictures_keep_their_captions(assembled, quick_config, tiny_images, tmp_path, buckets, world) -> None:
    """From files to batches: each latent is nearest to its own picture's, each embedding is its own caption's."""
    options = ("train.batch_size=2", "train.gradient_accumulation=2", "data.sources.0.repeats=2")
    training = assembled(quick_config(tmp_path / "run", *options, f"data.buckets={str(buckets).lower()}"))
    base, vae = training.plan.base, load_vae(training.plan.base, torch.float32)
    clip = load_text_encoder(base, "clip_l", torch.float32)
    files = sorted(tiny_images.glob("*.png"))
    hidden = {file.name: clip.encode([file.with_suffix(".txt").read_text()])[0]["hidden"] for file in files}

    @functools.cache
    @torch.no_grad()
    def pictures(height: int, width: int) -> dict[str, torch.Tensor]:
        """Every picture as a latent of that size, whichever it was cut to for training."""
        found = {}
        for file in files:
            cut = np.array(ImageOps.fit(Image.open(file).convert("RGB"), (width, height)))
            mean = vae.encode((torch.from_numpy(cut) / 127.5 - 1).permute(2, 0, 1)[None]).latent_dist.mean[0]
            found[file.name] = (mean - vae.config.shift_factor) * vae.config.scaling_factor
        return found

    seen, shapes = set(), set()
    for rank in range(world):
        batches = make_run_batches(training.plan, training.encoded, dataclasses.replace(ALONE, rank=rank, world=world))
        for batch in fetch_all(batches, 10 // world):
            shapes.add((8 * batch.latents.shape[2], 8 * batch.latents.shape[3]))
            for name, latent, found in zip(
                batch.names, batch.latents, batch.embeddings["clip_l"]["hidden"], strict=True
            ):
                distances = {
                    other: (latent - mean).norm().item()
                    for other, mean in pictures(8 * latent.shape[1], 8 * latent.shape[2]).items()
                }
                assert min(distances, key=distances.__getitem__) == name
                assert torch.equal(found, hidden[name])
                seen.add(name)
    assert seen == hidden.keys()
    assert (len(shapes) > 1) == buckets


def test_every_image_comes_once_an_epoch_in_an_order_of_its_own(store) -> None:
    order = [images_of(batch)[0] for batch in fetch_all(make_batches(store), 4 * IMAGES)]
    epochs = [tuple(order[start : start + IMAGES]) for start in range(0, len(order), IMAGES)]
    assert all(sorted(epoch) == list(range(IMAGES)) for epoch in epochs)
    assert len(set(epochs)) > 1


@pytest.mark.parametrize("sizes", [ONE_SIZE, MIXED], ids=["squares", "buckets"])
def test_two_processes_see_what_one_sees(store, sizes) -> None:
    one = fetch_all(make_batches(store, batch_size=2, accumulation=2, sizes=sizes), 6)
    ranks = [fetch_all(make_batches(store, accumulation=2, rank=rank, world=2, sizes=sizes), 6) for rank in (0, 1)]
    for whole, first, second in zip(one, *ranks, strict=True):
        assert [*first.names, *second.names] == list(whole.names)
        for field in ("latents", "noise", "sigma"):
            halves = torch.cat([getattr(first, field), getattr(second, field)])
            assert torch.equal(halves, getattr(whole, field))


def test_micro_steps_are_a_larger_batch_cut_up(store) -> None:
    whole = fetch_all(make_batches(store, batch_size=6), 4)
    cut = fetch_all(make_batches(store, batch_size=2, accumulation=3), 4)
    for number, batch in enumerate(whole):
        pieces = cut[3 * number : 3 * number + 3]
        assert torch.equal(batch.noise, torch.cat([piece.noise for piece in pieces]))
        assert list(batch.names) == [name for piece in pieces for name in piece.names]


@pytest.mark.parametrize("sizes", [ONE_SIZE, MIXED], ids=["squares", "buckets"])
def test_a_batch_depends_on_nothing_that_was_fetched_before(store, sizes) -> None:
    in_order = fetch_all(make_batches(store, batch_size=2, accumulation=2, sizes=sizes), 5)
    torch.manual_seed(123)
    jumping = make_batches(store, batch_size=2, accumulation=2, sizes=sizes)
    for step, micro in [(4, 1), (0, 0), (2, 1), (2, 0), (4, 1)]:
        batch, expected = jumping.fetch(step, micro), in_order[2 * step + micro]
        assert batch.names == expected.names
        for field in ("latents", "noise", "sigma"):
            assert torch.equal(getattr(batch, field), getattr(expected, field))
    jumping.close()


def test_squares_come_in_the_order_that_the_plain_stream_gives(store) -> None:
    """Computed without the code under test, so that a run from before there were buckets goes on as it was."""
    batches = fetch_all(make_batches(store, batch_size=2, accumulation=2), 5)
    found = [image for batch in batches for image in images_of(batch)]
    assert found == [index_at(7, position, IMAGES) for position in range(20)]


def test_every_bucket_has_its_share_of_the_batches(store) -> None:
    batches = fetch_all(make_batches(store, batch_size=2, sizes=MIXED), 5 * 10)
    shapes = Counter(tuple(8 * side for side in batch.latents.shape[2:]) for batch in batches)
    assert shapes == {(16, 16): 20, (8, 24): 20, (24, 8): 10}


EMPTY = {encoder: f"{encoder}-empty" for encoder in ENCODERS}


def test_without_dropout_nothing_changes(store) -> None:
    plain = fetch_all(make_batches(store, batch_size=2), 5)
    for batch, other in zip(plain, fetch_all(make_batches(store, batch_size=2, dropout=Dropout(0, 0)), 5), strict=True):
        assert batch.names == other.names
        for encoder in ENCODERS:
            assert torch.equal(batch.embeddings[encoder]["hidden"], other.embeddings[encoder]["hidden"])


def test_dropped_captions_and_encoders_are_those_that_step_and_slot_say(store) -> None:
    """Each recomputed; a dropped encoder is zeros, pooled half included, a dropped caption the empty one's encoding."""
    dropout = Dropout(caption=0.3, encoder=0.25, empty=EMPTY)
    plain = fetch_all(make_batches(store, batch_size=2, accumulation=2), 100)
    batches = fetch_all(make_batches(store, batch_size=2, accumulation=2, dropout=dropout), 100)
    seen: Counter[str] = Counter()
    for number, (batch, undropped) in enumerate(zip(batches, plain, strict=True)):
        for field in ("latents", "noise", "sigma"):
            assert torch.equal(getattr(batch, field), getattr(undropped, field))
        for row, image in enumerate(images_of(batch)):
            step, slot = number // 2, 2 * (number % 2) + row
            empty = uniform(7, step, slot, "caption dropout") < 0.3
            seen["caption"] += empty
            for encoder in ENCODERS:
                zeros = uniform(7, step, slot, "encoder dropout", encoder) < 0.25
                seen[encoder] += zeros
                expected = 0 if zeros else 99 if empty else image + 1
                for tensor in batch.embeddings[encoder].values():
                    assert (tensor[row] == expected).all()
    samples = 400
    assert abs(seen["caption"] / samples - 0.3) < 3 * (0.3 * 0.7 / samples) ** 0.5
    for encoder in ENCODERS:
        assert abs(seen[encoder] / samples - 0.25) < 3 * (0.25 * 0.75 / samples) ** 0.5


def test_encoders_are_dropped_independently(store) -> None:
    batches = fetch_all(make_batches(store, batch_size=4, dropout=Dropout(encoder=0.5)), 100)
    dropped = torch.cat(
        [
            torch.stack([(batch.embeddings[e]["hidden"] == 0).flatten(1).all(1) for e in ENCODERS], 1)
            for batch in batches
        ]
    )
    patterns = Counter(map(tuple, dropped.tolist()))
    assert len(patterns) == 8
    assert sum((count - 50) ** 2 / 50 for count in patterns.values()) < 24.3  # 7 degrees of freedom, one in a thousand


def test_certain_dropout_leaves_nothing_of_the_captions(store) -> None:
    for dropout, value in ((Dropout(caption=1.0, empty=EMPTY), 99), (Dropout(encoder=1.0), 0)):
        for batch in fetch_all(make_batches(store, batch_size=3, dropout=dropout), 5):
            assert all((tensor == value).all() for entry in batch.embeddings.values() for tensor in entry.values())


@pytest.mark.parametrize("world", [1, 2])
def test_two_ranks_drop_what_one_drops(store, world) -> None:
    dropout = Dropout(caption=0.3, encoder=0.3, empty=EMPTY)
    whole = fetch_all(make_batches(store, batch_size=4, dropout=dropout, sizes=MIXED), 10)
    ranks = [
        fetch_all(make_batches(store, batch_size=4 // world, rank=rank, world=world, dropout=dropout, sizes=MIXED), 10)
        for rank in range(world)
    ]
    for number, batch in enumerate(whole):
        for encoder, entry in batch.embeddings.items():
            parts = torch.cat([of[number].embeddings[encoder]["hidden"] for of in ranks])
            assert torch.equal(parts, entry["hidden"])


def test_noise_and_sigma_differ_between_samples_and_seeds(store) -> None:
    batches = fetch_all(make_batches(store, batch_size=2), 10) + fetch_all(make_batches(store, seed=8), 10)
    noise = torch.cat([batch.noise for batch in batches])
    sigma = torch.cat([batch.sigma for batch in batches])
    assert len(noise.flatten(1).unique(dim=0)) == len(noise) == 30
    assert len(sigma.unique()) == 30
    assert (sigma > 0).all()
    assert (sigma < 1).all()


def test_the_posterior_is_drawn_anew_each_time_and_normalised(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.writer() as writer:
        writer.put("image", {"mean": torch.full((1, 64, 64), 5.0), "std": torch.full((1, 64, 64), 2.0)})
    batches = Batches(
        store, [Example("x.png", ("image",), {}, (512, 512))], seed=0, batch_size=1, accumulation=1, rank=0, world=1,
        device=torch.device("cpu"), scaling=LatentScaling(1.5, 1.0), sigma_of=lambda u, pixels: u,
    )  # fmt: skip
    first, second = fetch_all(batches, 2)
    assert not torch.equal(first.latents, second.latents)
    assert first.latents.mean().item() == pytest.approx((5 - 1) * 1.5, abs=0.1)
    assert first.latents.std().item() == pytest.approx(2 * 1.5, abs=0.1)
    assert abs(torch.corrcoef(torch.stack([first.latents.flatten(), first.noise.flatten()]))[0, 1]) < 0.05


def test_what_went_wrong_while_reading_ahead_is_raised(store) -> None:
    batches = make_batches(store)
    gone = Example("gone.png", ("no such key",), {}, (16, 16))
    batches.buckets = {name: [gone] * len(examples) for name, examples in batches.buckets.items()}
    with pytest.raises(KeyError):
        batches.fetch(0, 0)
    batches.close()


def test_sigma_is_drawn_for_the_size_of_the_images(store) -> None:
    """Latents of 2 x 2 are images of 16 x 16 pixels."""
    batch = make_batches(store, batch_size=3, sigma_of=lambda u, pixels: torch.full_like(u, pixels)).fetch(0, 0)
    assert batch.sigma.tolist() == [256.0] * 3


def test_sigma_follows_the_bucket_of_each_batch(store) -> None:
    batches = make_batches(store, batch_size=2, sizes=MIXED, sigma_of=lambda u, pixels: torch.full_like(u, pixels))
    found = fetch_all(batches, 10)
    assert {batch.sigma[0].item() for batch in found} == {192.0, 256.0}
    for batch in found:
        assert batch.sigma.tolist() == [MIXED[image][0] * MIXED[image][1] for image in images_of(batch)]


def test_noise_offset_adds_a_constant_per_image_and_channel(store) -> None:
    plain = fetch_all(make_batches(store, batch_size=2), 50)
    moved = fetch_all(make_batches(store, batch_size=2, noise_offset=0.1), 50)
    offsets = torch.cat([after.noise - before.noise for before, after in zip(plain, moved, strict=True)])
    torch.testing.assert_close(offsets, offsets[:, :, :1, :1].expand_as(offsets), rtol=0, atol=1e-6)
    constants = offsets[:, :, 0, 0]
    assert constants.std().item() == pytest.approx(0.1, rel=0.15)
    assert len(constants.unique(dim=0)) == 100
    assert abs(torch.corrcoef(constants.T)[0, 1]) < 0.3
    for before, after in zip(plain, moved, strict=True):
        assert torch.equal(before.latents, after.latents)
        assert torch.equal(before.sigma, after.sigma)


def test_two_processes_have_the_offsets_of_one(store) -> None:
    one = make_batches(store, batch_size=2, noise_offset=0.1).fetch(3, 0)
    ranks = [make_batches(store, rank=rank, world=2, noise_offset=0.1).fetch(3, 0) for rank in (0, 1)]
    assert torch.equal(torch.cat([batch.noise for batch in ranks]), one.noise)


def test_other_seeds_differ_by_purpose_step_micro_step_rank_and_run(store) -> None:
    seeds = [
        make_batches(store, rank=rank, world=2, seed=seed).seed_for(purpose, step, micro)
        for rank in (0, 1) for seed in (1, 2) for purpose in ("a", "b") for step in (0, 1) for micro in (0, 1)
    ]  # fmt: skip
    assert len(set(seeds)) == 32


def test_input_perturbation_moves_the_input_and_not_the_target(store) -> None:
    plain = fetch_all(make_batches(store, batch_size=2), 50)
    perturbed = fetch_all(make_batches(store, batch_size=2, input_perturbation=0.1), 50)
    added = []
    for one, other in zip(plain, perturbed, strict=True):
        assert one.input_noise is None
        assert torch.equal(one.noise, other.noise)
        added.append(other.input_noise - other.noise)
    assert torch.cat(added).std().item() == pytest.approx(0.1, rel=0.05)
    drawn = torch.cat([batch.noise for batch in perturbed]).flatten()
    assert abs(torch.corrcoef(torch.stack([drawn, torch.cat(added).flatten()]))[0, 1]) < 0.05


def test_input_perturbation_follows_from_seed_step_and_slot(store) -> None:
    one = make_batches(store, batch_size=2, input_perturbation=0.1).fetch(3, 0)
    ranks = [make_batches(store, rank=rank, world=2, input_perturbation=0.1).fetch(3, 0) for rank in (0, 1)]
    assert torch.equal(torch.cat([batch.input_noise for batch in ranks]), one.input_noise)
    assert torch.equal(one.rows(slice(1, 2)).input_noise, one.input_noise[1:])

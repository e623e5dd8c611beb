"""Several T5 lengths: one a step, for all samples, ranks and micro-steps; everything else as at one length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from sd3tune.data.store import Store
from sd3tune.model.compute.hoist import hoist
from sd3tune.model.load.components import load_text_encoder
from sd3tune.training.ahead import AheadBatches
from sd3tune.training.batches import Batches, Dropout, LatentScaling
from sd3tune.training.examples import ClassImages, Example, OwnPrediction

LENGTHS = (3, 5, 8)
CAPTIONS = {"a": 1.0, "b": 2.0, "class": 3.0, "": 4.0}
"""Each with its value everywhere in T5's embeddings."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    with store.writer() as writer:
        writer.put("image", {"mean": torch.zeros(4, 2, 2), "std": torch.zeros(4, 2, 2)})
        for text, value in CAPTIONS.items():
            for length in LENGTHS:
                writer.put(f"{text}-{length}", {"hidden": torch.full((length, 2), value)})
    return store


def example(text: str, prior=None) -> Example:
    return Example(text, ("image",), {"t5": f"{text}-5"}, (16, 16), 1.0, prior)


PRIORS = {
    "none": None,
    "class images": ClassImages(0, {(16, 16): [example("class")]}),
    "own prediction": OwnPrediction([{"t5": "class-5"}], 1.0),
}


def make_batches(store: Store, prior: str = "none", *, seed=0, rank=0, world=1, lengths=LENGTHS) -> Batches:
    return Batches(
        store,
        [example(text, PRIORS[prior]) for text in ("a", "b")],
        seed=seed, batch_size=2, accumulation=2, rank=rank, world=world, device=torch.device("cpu"),
        scaling=LatentScaling(1.0, 0.0), sigma_of=lambda u, pixels: u,
        dropout=Dropout(caption=0.3, empty={"t5": "-5"}),
        t5_lengths=[{f"{text}-5": f"{text}-{length}" for text in CAPTIONS} for length in lengths],
    )  # fmt: skip


def lengths_of(batches: Batches, steps: int) -> list[int]:
    """By step; each must be the same for all of its micro-steps."""
    found = [
        {batches.fetch(step, micro).embeddings["t5"]["hidden"].shape[1] for micro in (0, 1)} for step in range(steps)
    ]
    batches.close()
    assert all(len(of) == 1 for of in found)
    return [length for of in found for length in of]


@pytest.mark.parametrize("prior", PRIORS)
def test_a_step_has_one_length_on_all_ranks_and_each_row_its_own_caption(store: Store, prior: str) -> None:
    seen: Counter[float] = Counter()
    expected = lengths_of(make_batches(store), 12)
    for rank in (0, 1):
        batches = make_batches(store, prior, rank=rank, world=2)
        for step in range(12):
            for micro in (0, 1):
                batch = batches.fetch(step, micro)
                hidden = batch.embeddings["t5"]["hidden"]
                assert hidden.shape[1] == expected[step]
                for row, name in zip(hidden, batch.names, strict=True):
                    assert row.unique().numel() == 1
                    seen[row[0, 0].item()] += 1
                    if name == "class":
                        assert row[0, 0].item() in (CAPTIONS["class"], CAPTIONS[""])
        batches.close()
    assert set(seen) == {value for text, value in CAPTIONS.items() if text != "class" or prior != "none"}


def test_lengths_come_equally_often_in_an_order_that_seed_and_step_decide(store: Store) -> None:
    found = lengths_of(make_batches(store), 60)
    assert Counter(found) == dict.fromkeys(LENGTHS, 20)
    assert found[:30] != found[30:]
    assert lengths_of(make_batches(store), 60) == found
    assert lengths_of(make_batches(store, seed=1), 60) != found
    begun_late = make_batches(store)
    assert begun_late.fetch(41, 1).embeddings["t5"]["hidden"].shape[1] == found[41]
    begun_late.close()


def test_without_further_lengths_the_examples_own_keys_are_read(store: Store) -> None:
    assert lengths_of(make_batches(store, lengths=()), 8) == [5] * 8


SEVERAL = ("model.extra_t5_lengths=[24, 20, 24]", "train.batch_size=2", "data.caption_dropout=0.2")


def test_a_run_reads_what_t5_makes_of_its_captions_at_each_length(quick_config, assembled, tmp_path: Path) -> None:
    training = assembled(quick_config(tmp_path, *SEVERAL, "data.sources.0.prior={kind: prediction, prompt: a photo}"))
    embedded = {
        length: {
            text: load_text_encoder(training.plan.base, "t5", torch.float32, max_sequence_length=length).encode([text])[
                0
            ]
            for text in ("", "a photo", *(record.caption for record in training.plan.records))
        }
        for length in (16, 20, 24)
    }
    for step in range(6):
        batch = training.batches.fetch(step, 0)
        embeds, _ = training.method.conditioning(batch.embeddings, training.transformer)
        known = embedded[embeds.shape[1] - 77].values()
        for row in embeds[:, 77:]:
            assert any(torch.equal(row, entry["hidden"]) for entry in known)


def test_modulations_computed_ahead_do_not_depend_on_the_length(quick_config, assembled, tmp_path: Path) -> None:
    one, several = (
        assembled(quick_config(tmp_path / f"{len(more)}", *SEVERAL[1:], *more)) for more in ((), SEVERAL[:1])
    )
    found = []
    for training in (one, several):
        hoist(training.transformer)
        ahead = AheadBatches(training.batches, training.transformer, training.method)
        found.append([ahead.fetch(step, 0) for step in range(4)])
    for alone, among in zip(*found, strict=True):
        assert all(map(torch.equal, alone.modulation, among.modulation))
        assert torch.equal(alone.noise, among.noise)
        assert torch.equal(alone.embeddings["clip_l"]["hidden"], among.embeddings["clip_l"]["hidden"])

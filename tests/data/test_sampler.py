import hashlib
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd3tune.data.concepts import balanced
from sd3tune.data.sampler import (
    batch_samples,
    epoch_order,
    generator,
    index_at,
    step_slots,
    times_seen,
    uniform,
)
from sd3tune.data.seeds import derive


def seen(seed: int, n: int, steps: int, accumulation: int, world: int, batch: int) -> list[list[int]]:
    """Per step, the samples in slot order, gathered from every rank and micro-step."""
    per_step = accumulation * world * batch
    found = []
    for step in range(steps):
        slots = [
            slot
            for micro in range(accumulation)
            for rank in range(world)
            for slot in step_slots(micro, rank, world, batch)
        ]
        found.append([index_at(seed, step * per_step + slot, n) for slot in slots])
    return found


@pytest.mark.parametrize("n", [1, 2, 5, 7, 40])
def test_every_epoch_sees_every_sample_exactly_once(n):
    for epoch in range(4):
        counts = Counter(index_at(3, position, n) for position in range(epoch * n, (epoch + 1) * n))
        assert counts == Counter(range(n))


@pytest.mark.parametrize(("accumulation", "world", "batch"), [(4, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4)])
def test_any_division_of_the_global_batch_sees_the_same_samples(accumulation, world, batch):
    alone = seen(seed=11, n=7, steps=9, accumulation=1, world=1, batch=4)
    assert seen(seed=11, n=7, steps=9, accumulation=accumulation, world=world, batch=batch) == alone


def test_slots_of_the_ranks_are_disjoint_and_fill_the_step():
    slots = [slot for micro in range(3) for rank in range(4) for slot in step_slots(micro, rank, world=4, batch_size=2)]
    assert slots == list(range(3 * 4 * 2))


def test_order_changes_with_the_epoch_and_with_the_seed():
    assert epoch_order(0, 0, 20) != epoch_order(0, 1, 20)
    assert epoch_order(0, 0, 20) != epoch_order(1, 0, 20)


@pytest.mark.long
def test_order_and_seeds_are_the_same_in_another_process():
    code = (
        "from sd3tune.data.sampler import *;"
        "print([index_at(5, p, 9) for p in range(30)], derive(5, 1, 'noise'), generator(5, 1).initial_seed())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = f"{[index_at(5, p, 9) for p in range(30)]} {derive(5, 1, 'noise')} {generator(5, 1).initial_seed()}"
    assert other == here


def test_order_does_not_depend_on_what_was_asked_before():
    late_first = [index_at(2, position, 6) for position in (100, 3, 50)]
    epoch_order.cache_clear()
    assert [index_at(2, position, 6) for position in (3, 50, 100)] == [
        late_first[1],
        late_first[2],
        late_first[0],
    ]


def test_derive_tells_apart_what_concatenation_would_not():
    arguments = [(1, 23), (12, 3), (1, "23"), (1, 2, 3), (3, 12), (-1, 23), (1, "2", "3")]
    assert len({derive(*args) for args in arguments}) == len(arguments)


def test_derive_is_pinned():
    # printf '[0,"noise",7]' | b2sum -l 64, without its lowest bit; another value would change every run
    digest = hashlib.blake2b(b'[0,"noise",7]', digest_size=8).digest()
    assert derive(0, "noise", 7) == int.from_bytes(digest, "big") // 2
    assert 0 <= derive(0, "noise", 7) < 2**63


def test_generators_are_independent_of_the_global_state_and_leave_it_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.randn(4, generator=generator(1, "noise", 2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(torch.randn(4, generator=generator(1, "noise", 2)), first)
    assert not torch.equal(torch.randn(4, generator=generator(1, "noise", 3)), first)


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        index_at(0, 0, 0)


def named(counts):
    return [(f"bucket {number}", n) for number, n in enumerate(counts)]


some_counts = st.lists(st.integers(1, 40), min_size=1, max_size=5)
batch_sizes = st.integers(1, 12)
seeds = st.integers(0, 2**63 - 1)


@given(seeds, st.integers(1, 30), batch_sizes)
def test_a_single_bucket_is_cut_from_the_plain_stream(seed, n, batch):
    found = [index for number in range(20) for index in batch_samples(seed, number, [("a", n)], batch)[2]]
    assert found == [index_at(seed, position, n) for position in range(20 * batch)]


@settings(deadline=None)
@given(seeds, some_counts, batch_sizes, st.integers(1, 6))
def test_over_epochs_every_sample_is_seen_equally_often_but_for_a_batch(seed, counts, batch, epochs):
    buckets = named(counts)
    batches = [batch_samples(seed, k, buckets, batch) for k in range(sum(epochs * n // batch for n in counts))]
    assert all(len(indices) == batch for _, _, indices in batches)
    for name, n in buckets:
        seen = Counter(index for bucket, _, indices in batches if bucket == name for index in indices)
        assert set(seen) <= set(range(n))
        assert sum(seen.values()) == epochs * n // batch * batch
        per_sample = [seen[index] for index in range(n)]
        assert max(per_sample) - min(per_sample) <= 1
        assert max(per_sample) <= epochs


@settings(deadline=None)
@given(seeds, some_counts, batch_sizes, st.integers(0, 120))
def test_how_often_samples_come_is_known_without_drawing_them(seed, counts, batch, batches):
    buckets = named(counts)
    seen = Counter((name, index) for k in range(batches) for name, _, found in [batch_samples(seed, k, buckets, batch)]
                   for index in found)  # fmt: skip
    assert times_seen(seed, batches, buckets, batch) == [[seen[name, i] for i in range(n)] for name, n in buckets]


@settings(deadline=None)
@given(seeds, some_counts, batch_sizes, st.integers(0, 300))
def test_a_batch_follows_from_its_number_alone(seed, counts, batch, number):
    """Also the definition, spelled out: epochs one after the other, each a shuffle of its buckets' next batches."""
    buckets = named(counts)
    at_once = batch_samples(seed, number, buckets, batch)
    epoch, before, following = 0, 0, Counter()
    while True:
        labels = [b for b, n in enumerate(counts) for _ in range((epoch + 1) * n // batch - epoch * n // batch)]
        if number < before + len(labels):
            break
        following.update(labels)
        before, epoch = before + len(labels), epoch + 1
    in_order = [batch_samples(seed, k, buckets, batch) for k in range(before, before + len(labels))]
    assert in_order[number - before] == at_once
    assert Counter(bucket for bucket, _, _ in in_order) == Counter(buckets[b][0] for b in labels)
    for bucket, (name, n) in enumerate(buckets):
        stream = seed if len(buckets) == 1 else derive(seed, "bucket", name)
        start = following[bucket] * batch
        indices = [index for label, _, found in in_order if label == name for index in found]
        assert indices == [index_at(stream, start + offset, n) for offset in range(len(indices))]


@settings(deadline=None)
@given(seeds, some_counts, st.sampled_from([(1, 6), (2, 3), (3, 2), (6, 1)]), st.integers(0, 50))
def test_ranks_share_a_batch_without_a_gap_or_an_overlap(seed, counts, division, number):
    """However six samples are divided, `world` ranks of `batch_size`, their parts in order are the whole."""
    world, batch_size = division
    whole = batch_samples(seed, number, named(counts), 6)[2]
    parts = [whole[rank * batch_size : (rank + 1) * batch_size] for rank in range(world)]
    slots = [list(step_slots(0, rank, world, batch_size)) for rank in range(world)]
    assert [index for part in parts for index in part] == whole
    assert [[whole[slot] for slot in of] for of in slots] == parts


def test_buckets_are_mixed_within_an_epoch_and_anew_in_the_next():
    labels = [batch_samples(0, k, [("a", 20), ("b", 20)], 2)[0] for k in range(60)]
    epochs = [labels[start : start + 20] for start in (0, 20, 40)]
    assert all(Counter(epoch) == {"a": 10, "b": 10} for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(epoch != sorted(epoch) for epoch in epochs)
    assert labels != [batch_samples(1, k, [("a", 20), ("b", 20)], 2)[0] for k in range(60)]


def test_buckets_smaller_than_a_batch_take_their_turn_once_it_is_full():
    """2 and 1 images in batches of 4: after two epochs there is one batch of the first, after four of the second."""
    labels = [batch_samples(5, k, [("two", 2), ("one", 1)], 4) for k in range(30)]
    assert Counter(name for name, _, _ in labels) == {"two": 20, "one": 10}
    assert all(sorted(indices) == [0, 0, 1, 1] for name, _, indices in labels if name == "two")


def test_batches_far_into_a_run_are_found_at_once():
    name, _, indices = batch_samples(3, 10**12, [("a", 7), ("b", 1000), ("c", 31)], 8)
    assert name in "abc"
    assert len(indices) == 8


@pytest.mark.parametrize("buckets", [[], [("a", 0)], [("a", 3), ("b", 0)]])
def test_a_bucket_without_samples_is_refused(buckets):
    with pytest.raises(ValueError, match="at least one sample"):
        batch_samples(0, 0, buckets, 1)


def test_uniform_numbers_fill_the_unit_interval_evenly():
    drawn = torch.tensor([uniform(0, "x", number) for number in range(20000)], dtype=torch.float64)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, 10, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi squared, 9 degrees of freedom, one in a thousand


concept_counts = st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2), min_size=1, max_size=3).filter(
    lambda buckets: all(map(sum, buckets)) and all(map(sum, zip(*buckets, strict=True)))
)
"""Samples of two concepts in each bucket."""


def in_parts(buckets, shares):
    concepts = {str(name): [0] * first + [1] * second for name, (first, second) in enumerate(buckets)}
    return list(balanced(concepts, [Fraction(share) for share in shares]).items())


@settings(deadline=None, max_examples=40)
@given(seeds, concept_counts, st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(1, 4))
def test_concepts_have_their_shares_whatever_their_numbers_of_samples(seed, buckets, shares, epochs):
    """In single batches, after whole epochs, within a sample per bucket; and each sample of a concept as often."""
    parts, total = in_parts(buckets, shares), sum(map(sum, buckets))
    batches = sum(epochs * rate // 1 for _, of in parts for _, rate in of)
    drawn, samples = Counter(), Counter()
    for number in range(batches):
        name, _, (index,) = batch_samples(seed, number, parts, 1)
        first = buckets[int(name)][0]
        drawn[int(index >= first)] += 1
        samples[name, index] += 1
    for concept, share in enumerate(shares):
        assert 0 <= Fraction(epochs * total * share, sum(shares)) - drawn[concept] < len(buckets)
    for name, (first, second) in enumerate(buckets):
        for indices in (range(first), range(first, first + second)):
            times = [samples[str(name), index] for index in indices]
            assert not times or max(times) - min(times) <= 1


@settings(deadline=None, max_examples=40)
@given(seeds, concept_counts, st.integers(1, 4), st.integers(0, 60))
def test_parts_are_seen_as_often_as_is_foretold(seed, buckets, batch, batches):
    parts = in_parts(buckets, (1, 2))
    seen = Counter(
        (name, i) for k in range(batches) for name, _, found in [batch_samples(seed, k, parts, batch)] for i in found
    )
    foretold = times_seen(seed, batches, parts, batch)
    assert foretold == [[seen[name, i] for i in range(sum(n for n, _ in of))] for name, of in parts]


def test_balanced_concepts_alternate_and_a_single_one_changes_nothing():
    two = in_parts([[2, 10]], (1, 1))
    drawn = [index < 2 for k in range(48) for index in batch_samples(1, k, two, 1)[2]]
    assert [sum(drawn[start : start + 12]) for start in range(0, 48, 12)] == [6, 6, 6, 6]
    assert drawn != sorted(drawn)
    alone = list(balanced({"a": [0] * 5, "b": [0] * 3}, [Fraction(1)]).items())
    plain = [("a", 5), ("b", 3)]
    assert [batch_samples(4, k, alone, 2) for k in range(30)] == [batch_samples(4, k, plain, 2) for k in range(30)]


def test_balanced_batches_far_into_a_run_are_found_at_once():
    name, _, indices = batch_samples(3, 10**9, in_parts([[7, 100], [31, 1]], (1, 3)), 8)
    assert name in "01"
    assert len(indices) == 8

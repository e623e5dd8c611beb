import hashlib
import subprocess
import sys
from collections import Counter

import pytest
import torch

from sd3tune.data.sampler import derive, epoch_order, generator, index_at, step_slots


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

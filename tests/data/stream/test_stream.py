"""The order of a stream is a function of seed and position: for ranks, windows, batches, and on resuming."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sd3tune.data.stream.order import samples_of_window, shards_of_window
from sd3tune.data.stream.stream import Stream
from sd3tune.errors import DataError

SHARDS, EACH = 6, 5


def read(shard: int) -> list[int | None]:
    """Return the samples of a shard; every seventh is broken."""
    return [None if number % 7 == 3 else number for number in range(shard * EACH, (shard + 1) * EACH)]


def stream(reading=read, notes: Path | None = None, rank: int = 0, world: int = 1, batch_size: int = 3, **more):
    settings = {"seed": 0, "shards": SHARDS, "buffer": 2, **more}
    return Stream(reading, lambda n: n % 2, rank=rank, world=world, batch_size=batch_size, notes=notes, **settings)


def test_two_ranks_read_disjoint_shards_and_together_all() -> None:
    for epoch in range(3):
        windows = [
            shards_of_window(5, rank, 2, window, SHARDS, 1)
            for window in range(3 * epoch, 3 * epoch + 3)
            for rank in (0, 1)
        ]
        assert sorted(shard for window in windows for shard in window) == list(range(SHARDS))


def test_the_order_of_shards_and_samples_depends_on_the_seed_and_changes_with_the_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return shards_of_window(seed, 0, 1, epoch, 20, 20)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert sorted(samples_of_window(0, 1, 4, 50)) == list(range(50))
    assert len({samples_of_window(0, rank, window, 50) for rank in (0, 1) for window in (0, 1)}) == 4


def test_each_batch_has_one_bucket_and_an_epoch_every_sound_sample() -> None:
    batches = [stream_of.batch(number) for stream_of in [stream()] for number in range(40)]
    assert all(len({n % 2 for n in batch}) == 1 for batch in batches)
    seen = Counter(n for batch in batches for n in batch)
    sound = [n for shard in range(SHARDS) for n in read(shard) if n is not None]
    assert set(seen) == set(sound)
    assert max(seen.values()) - min(seen.values()) <= 2  # the last epoch is not whole, and samples wait for a batch


def test_two_ranks_together_train_on_every_sample_once_an_epoch() -> None:
    one, two = (stream(rank=rank, world=2, batch_size=1, buffer=1) for rank in (0, 1))
    sound = sorted(n for shard in range(SHARDS) for n in read(shard) if n is not None)
    count = sum(len([n for n in read(shard) if n is not None]) for window in range(3) for shard in _shards(0, window))
    first = [one.batch(number)[0] for number in range(count)]
    second = [two.batch(number)[0] for number in range(len(sound) - count)]
    assert sorted([*first, *second]) == sound


def _shards(rank: int, window: int) -> list[int]:
    return shards_of_window(0, rank, 2, window, SHARDS, 1)


@pytest.mark.parametrize("with_notes", [True, False])
def test_any_batch_is_found_again_without_the_ones_before(tmp_path, with_notes) -> None:
    notes = tmp_path / "notes.jsonl" if with_notes else None
    whole = stream(notes=notes)
    expected = [whole.batch(number) for number in range(60)]
    for number in (59, 17, 0, 31):
        assert stream(notes=notes).batch(number) == expected[number]


def test_notes_save_reading_the_windows_before(tmp_path) -> None:
    notes, opened = tmp_path / "notes.jsonl", list[int]()
    stream(notes=notes).batch(100)

    def counted(shard: int) -> list[int | None]:
        opened.append(shard)
        return read(shard)

    resumed = stream(counted, notes)
    resumed.batch(100)
    resumed.close()
    assert len(opened) <= 2 * 4  # its window, the windows of samples that were left over, and the next one


@pytest.mark.parametrize("damage", ["{", '{"window": 1}', "[]", "\0"])
def test_damaged_notes_change_nothing(tmp_path, damage) -> None:
    notes = tmp_path / "notes.jsonl"
    expected = stream(notes=notes).batch(30)
    notes.write_text(notes.read_text()[:90] + damage)
    assert stream(notes=notes).batch(30) == expected


def test_batches_of_some_steps_ago_are_still_there() -> None:
    ahead = stream()
    expected = [ahead.batch(number) for number in range(100)]
    assert ahead.batch(40) == expected[40]
    assert ahead.batch(99) == expected[99]


def test_shards_without_a_sound_sample_are_an_error() -> None:
    with pytest.raises(DataError, match="no shard has a sample that can be read"):
        stream(lambda shard: [None, None]).batch(0)

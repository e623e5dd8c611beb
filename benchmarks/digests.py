"""`python -m benchmarks.digests`: the cost of the digests of store entries and checkpoints in a training run.

In one process, two sides take turns: with digests and without. A turn is one pass over the store, whose entries count
as unread except for the batch that is read ahead, and one checkpoint. Later passes check nothing, so digests cost a
longer run less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from torch import Tensor

    from sd3tune.data.store import Store
    from sd3tune.training.loop import View

ROUNDS = 20
ORDER = (True, False, False, True)
"""Whether digests are on, per turn of a round; linear drift cancels out."""


def main(arguments: Sequence[str] | None = None) -> int:
    # Before torch loads OpenMP: a waiting thread that spins occupies a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks.cells import CELLS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.digests", description=__doc__)
    parser.add_argument("--cell", default="tiny-fp32", choices=list(CELLS), help="model and dtype")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at least 2; a round is two turns of each side")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sd3tune-bench-") as folder:
        row = measure(options.cell, Path(folder), options.rounds)
    ratio = "{median:.4f} ({low:.4f} to {high:.4f})".format(**row["ratio"])
    print(f"{options.cell}: speed with digests over without, in CPU time: {ratio}, {options.rounds} rounds")
    print(
        f"digests alone: {row['share']:.2%} of the CPU time, {row['ms_per_turn']:.2f} ms a turn: "
        f"{row['calls_per_turn']} tensors, {row['bytes_per_turn'] / 1e6:.1f} MB"
    )
    return 0


def measure(cell: str, folder: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the ratio of the speeds with and without digests, in CPU time, and the time measured in digests."""
    from benchmarks.cells import BATCH_SIZE, CELLS, MODELS
    from benchmarks.trainer import IMAGES, make_config, make_trainer

    trainer = make_trainer(make_config(CELLS[cell]), MODELS[CELLS[cell].model], folder)
    steps = IMAGES // BATCH_SIZE
    saving = trainer.config.checkpoint.model_copy(update={"every": steps})
    trainer.config = trainer.config.model_copy(update={"checkpoint": saving})
    turns = Turns(trainer.batches.store, steps)
    with closing(trainer.batches), turns.patched_digest("data.store"), turns.patched_digest("training.checkpoint"):
        trainer.train(until=(1 + rounds * len(ORDER)) * steps, callback=turns)
    spent = [turns.spent[start : start + len(ORDER)] for start in range(1, len(turns.spent), len(ORDER))]
    low, median, high = statistics.quantiles([(b + c) / (a + d) for a, b, c, d in spent], n=4, method="inclusive")
    with_digests = sum(a + d for a, _, _, d in spent)
    digested = [lap for lap in turns.digested if lap[0] > 0]  # without the warm-up turn
    seconds, nbytes = sum(lap[1] for lap in digested), sum(lap[2] for lap in digested)
    return {
        "ratio": {"median": median, "low": low, "high": high},
        "share": seconds / with_digests,
        "ms_per_turn": 1000 * seconds / (2 * rounds),
        "calls_per_turn": len(digested) // (2 * rounds),
        "bytes_per_turn": nbytes / (2 * rounds),
    }


class Turns:
    """A callback of the loop that times each turn and switches digests on and off; turn 0 is the warm-up."""

    def __init__(self, store: Store, steps: int) -> None:
        self.store, self.steps = store, steps
        self.spent: list[float] = []
        """CPU seconds of each turn, of all threads."""
        self.digested: list[tuple[int, float, int]] = []
        """(turn, CPU seconds, bytes) of each digest."""
        self._entries = dict(store._index)
        self._with_digests = True
        self._started = 0.0

    def __call__(self, view: View) -> None:
        turn, within = divmod(view.step, self.steps)
        if within:
            return
        if turn:
            self.spent.append(time.process_time() - self._started)
        self._with_digests = turn == 0 or ORDER[(turn - 1) % len(ORDER)]
        bare = {key: replace(entry, digest=None) for key, entry in self._entries.items()}
        self.store._index = self._entries if self._with_digests else bare
        self.store._sound.clear()
        self._started = time.process_time()

    def patched_digest(self, module: str) -> Any:
        """Return a context in which the module's digests are timed or, in turns without, left out."""
        from sd3tune.files.tensors import digest

        def timed(tensor: Tensor) -> str:
            if not self._with_digests:
                return ""
            started = time.thread_time()
            found = digest(tensor)
            self.digested.append((len(self.spent), time.thread_time() - started, tensor.nbytes))
            return found

        return patch(f"sd3tune.{module}.digest", timed)


if __name__ == "__main__":
    sys.exit(main())

"""Rows of a measurement: the scores of a run's checkpoints, their intervals, and their differences from other rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sd3tune.measures.intervals import Interval, interval, paired


@dataclass(frozen=True)
class Scores:
    """The measurements of one row. Tables are [prompts, seeds], the same ones in each row; NaN for missing ones."""

    name: str
    """As it is called in a sentence: "step 600"."""
    likeness: Tensor
    """Fidelity to the photos of pictures with the name."""
    prompts: Tensor | None = None
    """Prompt fidelity of the same pictures; None without a text encoder."""
    drift: Tensor | None = None
    """Fidelity to the photos of pictures of the class, without the name: [class prompts, seeds]; None without class."""
    diversity: float | None = None
    """Mean over prompts; None with one seed."""
    memorised: int = 0
    """Number of pictures with the name that copy a photo."""


@dataclass(frozen=True)
class Difference:
    """Paired differences of a row from another one."""

    likeness: Interval
    prompts: Interval | None
    drift: Interval | None


@dataclass(frozen=True)
class Checkpoint:
    """A row with its intervals; see `Scores`."""

    name: str
    likeness: Interval
    prompts: Interval | None
    drift: Interval | None
    diversity: float | None
    memorised: int
    over_base: Difference
    over_best: Difference | None = None
    """From the row with the highest likeness of the best kind; see `verdict.tabulate`."""

    @property
    def pictures(self) -> int:
        """Number of pictures with the name."""
        return self.likeness.count


def row(scores: Scores, base: Scores) -> Checkpoint:
    """Return the intervals of a row, and of its differences from the base."""
    return Checkpoint(
        name=scores.name,
        likeness=interval(scores.likeness),
        prompts=None if scores.prompts is None else interval(scores.prompts),
        drift=None if scores.drift is None else interval(scores.drift),
        diversity=scores.diversity,
        memorised=scores.memorised,
        over_base=difference(scores, base),
    )


def difference(first: Scores, second: Scores) -> Difference:
    """Return the intervals of `first - second`, paired by prompt and seed."""
    return Difference(
        likeness=paired(first.likeness, second.likeness),
        prompts=_paired(first.prompts, second.prompts),
        drift=_paired(first.drift, second.drift),
    )


def _paired(first: Tensor | None, second: Tensor | None) -> Interval | None:
    return None if first is None or second is None else paired(first, second)

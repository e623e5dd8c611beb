"""The verdict on a run: which checkpoint is best, whether it is good, overfitted or underfitted, and why.

A row is overfitted if one of these is certain: its class prompts show the subject, its prompts are followed less than
by the base, or its pictures copy photos. It is underfitted if its likeness is certainly too low, and good if its
likeness is certainly enough and none of the faults is possible. Certain means that a whole 95 % interval lies on one
side of a limit; else the row is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sd3tune.measures.checkpoints import Checkpoint, Scores, difference, row
from sd3tune.measures.intervals import Interval

Kind = Literal["good", "overfitted", "underfitted", "undecided"]
Answer = Literal["yes", "no", "perhaps"]
_PREFERRED: tuple[Kind, ...] = ("good", "undecided", "underfitted", "overfitted")


@dataclass(frozen=True)
class Limits:
    """The limits of a verdict, set by judgement, not by a standard."""

    likeness: float = 0.5
    """Least gain in likeness over the base: a share of the way to the photos among themselves."""
    drift: float = 0.25
    """Most gain of class prompts in fidelity to the photos: a share of the same way."""
    prompts: float = 0.05
    """Most loss in prompt fidelity: a share of the base's."""
    memorised: float = 0.25
    """Most copies of photos: a share of the pictures with the name."""


LIMITS = Limits()


@dataclass(frozen=True)
class Verdict:
    """A conclusion, or that there is none."""

    kind: Kind
    """Of the best row."""
    best: str
    """Its name: of rows that cannot be told apart, the earliest."""
    sentence: str


@dataclass(frozen=True)
class _Judged:
    """A row, and what is known about it."""

    row: Checkpoint
    like_enough: Answer
    shows_subject: Answer | None
    """None where drift was not measured; likewise below."""
    loses_prompts: Answer | None
    copies: Answer

    @property
    def kind(self) -> Kind:
        faults = (self.shows_subject, self.loses_prompts, self.copies)
        if "yes" in faults:
            return "overfitted"
        if self.like_enough == "no":
            return "underfitted"
        return "good" if self.like_enough == "yes" and "perhaps" not in faults else "undecided"


def tabulate(
    scores: Sequence[Scores], base: Scores, photos: Interval, limits: Limits = LIMITS
) -> tuple[list[Checkpoint], Checkpoint]:
    """Return the rows with their intervals, in the order of training, and the base's; see `verdict` for `photos`."""
    rows, base_row = [row(one, base) for one in scores], row(base, base)
    leader = scores[_leader([_judged(one, base_row, photos, limits) for one in rows])]
    rows = [replace(one, over_best=difference(own, leader)) for one, own in zip(rows, scores, strict=True)]
    return rows, base_row


def verdict(
    rows: Sequence[Checkpoint],
    base: Checkpoint,
    photos: Interval,
    *,
    subject: str = "subject",
    limits: Limits = LIMITS,
) -> Verdict:
    """Return the verdict on the rows of `tabulate`, in the order of training.

    `photos` is the interval of the photos among themselves, and `subject` the class word. Of rows whose likeness cannot
    be told apart, the earliest is taken, as it has moved least. Raises ValueError without rows.
    """
    judged = [_judged(one, base, photos, limits) for one in rows]
    leader = judged[_leader(judged)]
    tied = [leader]
    if leader.kind in ("good", "underfitted"):
        tied = [one for one in judged if one.kind == leader.kind and _reaches(one.row, leader.row)]
    words = _Words(judged, tied[0], tied, base, photos, subject)
    return Verdict(leader.kind, tied[0].row.name, words.sentence())


def _leader(judged: Sequence[_Judged]) -> int:
    """Return the index of the row with the highest likeness of the best kind; of overfitted ones, the least drift."""
    if not judged:
        raise ValueError("a verdict needs at least one row")
    kind = min((one.kind for one in judged), key=_PREFERRED.index)
    numbers = [number for number, one in enumerate(judged) if one.kind == kind]
    if kind == "overfitted":
        return min(numbers, key=lambda number: _mean(judged[number].row.drift))
    return max(numbers, key=lambda number: judged[number].row.likeness.mean)


def _mean(interval: Interval | None) -> float:
    return 0 if interval is None else interval.mean


def _reaches(one: Checkpoint, leader: Checkpoint) -> bool:
    """Return True if a row's likeness is not certainly below the leader's."""
    return one is leader or (one.over_best is not None and not one.over_best.likeness.below(0))


def _judged(one: Checkpoint, base: Checkpoint, photos: Interval, limits: Limits) -> _Judged:
    over = one.over_base
    room = _room(base, photos)
    shows = loses = None
    if over.drift is not None:
        shows = _is_above(over.drift, limits.drift * room)
    if over.prompts is not None and base.prompts is not None:
        loses = _opposite(_is_above(over.prompts, -limits.prompts * base.prompts.mean))
    return _Judged(
        row=one,
        like_enough=_is_above(over.likeness, limits.likeness * room),
        shows_subject=shows,
        loses_prompts=loses,
        copies="yes" if one.memorised > limits.memorised * one.pictures else "no",
    )


def _room(base: Checkpoint, photos: Interval) -> float:
    """Return the way from the base's likeness to the photos among themselves; NaN, which decides nothing, without."""
    room = photos.mean - base.likeness.mean
    return room if room > 0 else math.nan


def _is_above(interval: Interval, limit: float) -> Answer:
    return "yes" if interval.above(limit) else "no" if interval.below(limit) else "perhaps"


def _opposite(answer: Answer) -> Answer:
    return "no" if answer == "yes" else "yes" if answer == "no" else "perhaps"


@dataclass(frozen=True)
class _Words:
    """The sentence of a verdict."""

    judged: Sequence[_Judged]
    best: _Judged
    tied: Sequence[_Judged]
    base: Checkpoint
    photos: Interval
    subject: str

    def sentence(self) -> str:
        kind, name = self.best.kind, self.best.row.name
        if kind == "undecided":
            return f"{self._title()} undecided: {self._open()}"
        if kind == "overfitted":
            reason = self._faults(self.best)
            if len(self.judged) == 1:
                return f"{name} is overfitted: {reason}; take an earlier checkpoint, or train with a prior"
            return f"all {len(self.judged)} are overfitted: even at {name}, {reason}; train with a prior, or for less"
        parts = [self._likeness(), *self._kept()]
        if kind == "underfitted":
            parts = [f"{self._likeness()}, where the base has {self.base.likeness.mean:.2f}"]
        after = self._after()
        return f"{self._title()}: {', '.join(parts)}{after}"

    def _title(self) -> str:
        """Return the subject of the sentence and its verb."""
        name, count = self.best.row.name, len(self.judged)
        state = {"good": "good", "underfitted": "underfitted"}.get(self.best.kind, "")
        if count == 1:
            return f"{name} is {state}".rstrip()
        if len(self.tied) > 1:
            names = listed([one.row.name for one in self.judged], [one.row.name for one in self.tied])
            also = ", and all are underfitted" if state == "underfitted" else ""
            return f"{names} of {count} cannot be told apart{also}; {name} is the earliest"
        if self.best.kind == "undecided":
            return f"{name} leads {count}, and is"
        also = ", and still underfitted" if state == "underfitted" else ""
        return f"{name} is the best of {count}{also}"

    def _likeness(self) -> str:
        return f"likeness {self.best.row.likeness.mean:.2f} of the photos' own {self.photos.mean:.2f}"

    def _kept(self) -> list[str]:
        """Return what a good row keeps of the base."""
        prompts = [] if self.best.loses_prompts is None else ["prompts followed as well as by the base"]
        missing = ["drift not measured"] if self.best.shows_subject is None else []
        return [*prompts, *missing]

    def _after(self) -> str:
        """Return what happens to all rows from one after the best on."""
        first = len(self.judged)
        while first > 0 and self.judged[first - 1].kind == "overfitted":
            first -= 1
        if first == len(self.judged):
            clean = self.best.kind == "good" and self.best.shows_subject == "no"
            return f"; class prompts do not show your {self.subject}" if clean else ""
        start = self.judged[first]
        when = f"from {start.row.name} on" if first < len(self.judged) - 1 else f"at {start.row.name}"
        return f"; {when}, {self._faults(start)}"

    def _faults(self, one: _Judged) -> str:
        answers = {
            f"class prompts show your {self.subject}": one.shows_subject,
            "prompts are followed less than by the base": one.loses_prompts,
            f"{one.row.memorised} of {one.row.pictures} pictures copy photos": one.copies,
        }
        return " and ".join(text for text, answer in answers.items() if answer == "yes")

    def _open(self) -> str:
        """Return what is not known about an undecided row."""
        if math.isnan(_room(self.base, self.photos)):
            if math.isnan(self.photos.mean):
                return "the photos' own likeness needs at least two photos"
            return (
                f"the base alone has a likeness of {self.base.likeness.mean:.2f}, as much as the photos among "
                f"themselves ({self.photos.mean:.2f})"
            )
        answers = {
            f"the likeness of {_range(self.best.row.likeness)} is enough": self.best.like_enough,
            f"class prompts show your {self.subject}": self.best.shows_subject,
            "prompts are followed as well as by the base": self.best.loses_prompts,
        }
        questions = [text for text, answer in answers.items() if answer == "perhaps"]
        return f"it is open whether {', and whether '.join(questions)}; draw more prompts or seeds"


def _range(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.mean:.2f}"
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def listed(names: Sequence[str], some: Sequence[str]) -> str:
    """Return `some` of the `names`, in order, for a sentence: "steps 400 to 800", "steps 200 and 400", "a, b and c"."""
    steps = all(name.startswith("step ") for name in some) and len(some) > 1
    words = [name.removeprefix("step ") if steps else name for name in some]
    first = list(names).index(some[0])
    if len(some) > 2 and list(names)[first : first + len(some)] == list(some):
        text = f"{words[0]} to {words[-1]}"
    else:
        text = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return f"steps {text}" if steps else text

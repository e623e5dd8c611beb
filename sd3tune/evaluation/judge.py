"""The verdict on the rows of an evaluation, by its first encoder of likeness and its first of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sd3tune.evaluation.measuring import CLASS_SUBJECT, DIVERSITY, PROMPT, SUBJECT, Measured
from sd3tune.evaluation.pictures import BASE_ROW, SCORED
from sd3tune.evaluation.rows import Row, RowName, tables_of
from sd3tune.measures.checkpoints import Scores
from sd3tune.measures.verdict import tabulate, verdict


@dataclass(frozen=True)
class Judgement:
    """A verdict, or the reason why there is none."""

    kind: str
    """`good`, `overfitted`, `underfitted` or `undecided` for the best row; `none` without a verdict."""
    best: str | None
    """The name of the best row."""
    sentence: str


def judge(measured: Measured, names: Sequence[RowName], photos: Row, noun: str | None) -> Judgement:
    """Return the verdict on the trained rows; `photos` is the row of the photos among themselves."""
    encoder = main_encoder(measured)
    trained = [name for name in names if name.kind == "trained"]
    if encoder is None:
        return _none("no encoder of likeness could be loaded; name a local folder with --encoder NAME=FOLDER")
    if not trained:
        return _none("a folder of pictures has no base to compare with")
    if not any(name.kind == "base" for name in names):
        return _none("there is no row of the base to compare with")
    if (SUBJECT, encoder) not in photos.figures:
        return _none("the photos' own likeness needs at least two photos")
    own = photos.figures[SUBJECT, encoder].interval
    scores = [_scores(measured, name.name, encoder) for name in trained]
    rows, base = tabulate(scores, _scores(measured, BASE_ROW, encoder), own)
    found = verdict(rows, base, own, subject=noun or "subject")
    return Judgement(found.kind, found.best, found.sentence)


def main_encoder(measured: Measured) -> str | None:
    """Return the first encoder that measured likeness; None without one."""
    return next((encoder for values in measured.values for measure, encoder in values if measure == SUBJECT), None)


def _scores(measured: Measured, row: str, encoder: str) -> Scores:
    tables = tables_of(measured, row)
    diversity = tables.get((DIVERSITY, encoder))
    return Scores(
        name=row,
        likeness=tables[SUBJECT, encoder],
        prompts=next((table for (measure, _), table in tables.items() if measure == PROMPT), None),
        drift=tables.get((CLASS_SUBJECT, encoder)),
        diversity=None if diversity is None else float(diversity.mean()),
        memorised=new_copies(measured, row),
    )


def new_copies(measured: Measured, row: str) -> int:
    """Return the number of a row's pictures that copy a photo, where the base's picture of the same seed does not.

    Few or unlike photos are further from each other than from any picture of their kind, which the base draws, too.
    """
    copied = {
        (picture.row, picture.number, picture.seed): measured.copies.get((index, encoder), False)
        for encoder in [main_encoder(measured)]
        if encoder is not None
        for index, picture in enumerate(measured.pictures)
        if picture.kind == SCORED
    }
    return sum(
        is_copy and not copied.get((BASE_ROW, number, seed), False)
        for (owner, number, seed), is_copy in copied.items()
        if owner == row
    )


def _none(reason: str) -> Judgement:
    return Judgement("none", None, f"no verdict: {reason}")

"""Verdicts on runs whose pictures were made up: good, overfitted, underfitted, and without a conclusion."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sd3tune.measures.checkpoints import Scores
from sd3tune.measures.intervals import Interval, interval
from sd3tune.measures.verdict import Limits, Verdict, listed, tabulate, verdict

PROMPTS, SEEDS = 12, 4
PHOTOS = Interval(0.77, 0.74, 0.80, 5)
BASE = (0.40, 0.31, 0.35)
"""Likeness, prompt fidelity and drift of the base."""


def table(mean: float, noise: float, seed: int) -> Tensor:
    """Return scores whose deviations are those of prompt and seed, the same in every row, and a little of its own."""
    shared = torch.randn(PROMPTS, SEEDS, generator=torch.Generator().manual_seed(99))
    own = torch.randn(PROMPTS, SEEDS, generator=torch.Generator().manual_seed(seed))
    return mean + 0.05 * shared + noise * own


def scores(name: str, likeness: float, prompts: float, drift: float, noise: float = 0.01, memorised: int = 0) -> Scores:
    seed = sum(map(ord, name))
    return Scores(
        name=name,
        likeness=table(likeness, noise, seed),
        prompts=table(prompts, noise / 4, seed + 1),
        drift=table(drift, noise, seed + 2),
        memorised=memorised,
    )


def judge(rows: Sequence[Scores], photos: Interval = PHOTOS) -> Verdict:
    table_rows, base = tabulate(rows, scores("base", *BASE), photos)
    return verdict(table_rows, base, photos, subject="dog")


RUN = [
    scores("step 200", 0.48, 0.31, 0.35),
    scores("step 400", 0.62, 0.31, 0.36),
    scores("step 600", 0.71, 0.31, 0.37),
    scores("step 800", 0.75, 0.31, 0.60),
    scores("step 1000", 0.76, 0.29, 0.70),
]


def test_the_best_step_is_named_and_what_goes_wrong_after_it() -> None:
    found = judge(RUN)
    assert (found.kind, found.best) == ("good", "step 600")
    assert found.sentence == (
        "step 600 is the best of 5: likeness 0.71 of the photos' own 0.77, prompts followed as well as by the base; "
        "from step 800 on, class prompts show your dog"
    )


def test_a_good_run_says_that_class_prompts_are_untouched() -> None:
    assert judge(RUN[:3]).sentence == (
        "step 600 is the best of 3: likeness 0.71 of the photos' own 0.77, prompts followed as well as by the base; "
        "class prompts do not show your dog"
    )


def test_one_good_adapter() -> None:
    found = judge([RUN[2]])
    assert (found.kind, found.best) == ("good", "step 600")
    assert found.sentence.startswith("step 600 is good: likeness 0.71 of the photos' own 0.77, prompts followed")


def test_an_overfitted_adapter_is_called_so_with_all_its_faults() -> None:
    found = judge([scores("the adapter", 0.76, 0.25, 0.70, memorised=40)])
    assert found.kind == "overfitted"
    assert found.sentence == (
        "the adapter is overfitted: class prompts show your dog and prompts are followed less than by the base and "
        "40 of 48 pictures copy photos; take an earlier checkpoint, or train with a prior"
    )


def test_a_run_that_is_overfitted_from_its_start() -> None:
    found = judge(RUN[3:])
    assert (found.kind, found.best) == ("overfitted", "step 800")
    assert found.sentence == (
        "all 2 are overfitted: even at step 800, class prompts show your dog; train with a prior, or for less"
    )


def test_an_underfitted_run_is_called_so_and_says_what_the_base_has() -> None:
    found = judge([scores("step 100", 0.42, 0.31, 0.35), scores("step 200", 0.48, 0.31, 0.35)])
    assert (found.kind, found.best) == ("underfitted", "step 200")
    assert found.sentence == (
        "step 200 is the best of 2, and still underfitted: likeness 0.48 of the photos' own 0.77, where the base has "
        "0.40"
    )
    assert judge([RUN[0]]).sentence.startswith("step 200 is underfitted: likeness 0.48")


def test_steps_that_cannot_be_told_apart_are_named_and_the_earliest_is_taken() -> None:
    rows = [scores(f"step {step}", 0.70 + step * 1e-6, 0.31, 0.36, noise=0.02) for step in (400, 600, 800)]
    found = judge([RUN[0], *rows])
    assert (found.kind, found.best) == ("good", "step 400")
    assert found.sentence.startswith(
        "steps 400 to 800 of 4 cannot be told apart; step 400 is the earliest: likeness 0.7"
    )


def test_few_noisy_pictures_give_no_conclusion() -> None:
    few = [
        Scores(row.name, row.likeness[:2, :2], row.prompts[:2, :2], row.drift[:2, :2])
        for row in [scores("step 600", 0.60, 0.31, 0.44, noise=0.3)]
        if row.prompts is not None and row.drift is not None
    ]
    base = scores("base", *BASE)
    assert base.prompts is not None
    assert base.drift is not None
    rows, base_row = tabulate(
        few, Scores("base", base.likeness[:2, :2], base.prompts[:2, :2], base.drift[:2, :2]), PHOTOS
    )
    found = verdict(rows, base_row, PHOTOS, subject="dog")
    assert found.kind == "undecided"
    assert found.sentence.startswith("step 600 is undecided: it is open whether the likeness of ")
    assert found.sentence.endswith("; draw more prompts or seeds")


def test_an_open_question_about_drift_is_asked() -> None:
    found = judge([scores("step 400", 0.70, 0.31, 0.44, noise=0.1)])  # the limit is 0.35 + 0.25 * 0.37
    assert found.kind == "undecided"
    assert "it is open whether class prompts show your dog; draw more" in found.sentence


def test_without_a_class_the_verdict_says_that_drift_was_not_measured() -> None:
    row = RUN[2]
    rows, base = tabulate([Scores(row.name, row.likeness, row.prompts)], scores("base", *BASE), PHOTOS)
    found = verdict(rows, base, PHOTOS)
    assert found.kind == "good"
    assert found.sentence.endswith("prompts followed as well as by the base, drift not measured")


def test_one_photo_gives_no_verdict() -> None:
    found = judge([RUN[2]], interval(torch.full((1, 1), torch.nan)))
    assert found.kind == "undecided"
    assert found.sentence == "step 600 is undecided: the photos' own likeness needs at least two photos"


def test_photos_no_more_alike_than_the_bases_pictures_give_no_verdict() -> None:
    found = judge([RUN[2]], Interval(0.39, 0.3, 0.45, 5))
    assert found.kind == "undecided"
    assert "the base alone has a likeness of 0.40, as much as the photos among themselves (0.39)" in found.sentence


def test_rows_have_differences_paired_with_the_base_and_with_the_leader() -> None:
    rows, base = tabulate(RUN, scores("base", *BASE), PHOTOS)
    assert rows[2].over_base.likeness.mean == pytest.approx(0.31, abs=0.01)
    assert rows[2].over_base.likeness.low > 0.29  # the deviations that rows share are gone
    assert rows[2].over_best is not None
    assert rows[2].over_best.likeness == Interval(0, 0, 0, PROMPTS * SEEDS)
    assert rows[1].over_best is not None
    assert rows[1].over_best.likeness.high < 0
    assert base.over_base.likeness.mean == 0
    assert rows[0].pictures == PROMPTS * SEEDS


def test_limits_can_be_chosen() -> None:
    rows, base = tabulate(RUN[:1], scores("base", *BASE), PHOTOS)
    assert verdict(rows, base, PHOTOS, limits=Limits(likeness=0.1)).kind == "good"


def test_a_verdict_needs_rows() -> None:
    base = tabulate(RUN[:1], scores("base", *BASE), PHOTOS)[1]
    with pytest.raises(ValueError, match="at least one row"):
        verdict([], base, PHOTOS)


def test_names_are_listed_as_in_a_sentence() -> None:
    names = [f"step {number}" for number in (1, 2, 3, 4, 5)]
    assert listed(names, names[1:4]) == "steps 2 to 4"
    assert listed(names, names[1:3]) == "steps 2 and 3"
    assert listed(names, [names[0], names[2], names[4]]) == "steps 1, 3 and 5"
    assert listed(["a", "b"], ["a", "b"]) == "a and b"
    assert listed(names, names[:1]) == "step 1"

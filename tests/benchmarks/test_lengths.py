"""The table of the T5 lengths: pairs alone count, with Student's interval of their differences."""

from __future__ import annotations

from benchmarks.quality.lengths import ONE, PROMPTS, TWO, pairs, table
from benchmarks.report import environment


def test_the_table_pairs_the_seeds_and_states_the_interval() -> None:
    figures = {}
    for seed in range(5):
        for arm, gain in ((ONE, 0.0), (TWO, 0.01 * (seed + 1))):
            figures[f"{arm}/{seed}"] = {f"{what} at {n}": 0.5 + gain for what in ("subject", "others") for n in PROMPTS}
    figures[f"{ONE}/5"] = figures[f"{ONE}/0"]
    assert pairs(figures) == ["0", "1", "2", "3", "4"]
    lines = table({"figures": figures, "environment": environment()}).splitlines()
    # differences of 1 to 5 points: their mean is 3, their standard error sqrt(2.5 / 5), and t is 2.776
    assert lines[-1] == "| 256 | other shapes right | 50.0 | 53.0 | +3.0 +- 2.0 |"
    assert [line.split(" | ")[0] for line in lines[-6:]] == ["| 16", "| 16", "| 77", "| 77", "| 256", "| 256"]

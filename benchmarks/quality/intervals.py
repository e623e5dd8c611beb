"""95 % intervals of means over training seeds, by Student's t: few seeds need its wide tails."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantile of Student's t by degrees of freedom."""
FEWEST = 3
"""Pairs from which a difference is called one: two equal differences, of shares of few pictures, would be certain."""


def half_width(values: Sequence[float]) -> float:
    """Return half of the interval of the mean; NaN for one value or more than ten."""
    if len(values) - 1 not in T_95:
        return math.nan
    return T_95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5


def mean_and_half_width(values: Sequence[float], signed: bool = False, digits: int = 1) -> str:
    """Return `51.2 +- 6.3`, or `+51.2 +- 6.3` if `signed`; the mean alone where the interval is unknown."""
    mean, half = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}", half_width(values)
    return mean if math.isnan(half) else f"{mean} +- {half:.{digits}f}"


def differs(values: Sequence[float], others: Sequence[float]) -> bool:
    """Return True if the interval of the paired differences excludes 0; False for fewer than three pairs."""
    if len(values) < FEWEST:
        return False
    differences = [value - other for value, other in zip(values, others, strict=True)]
    return abs(statistics.mean(differences)) > half_width(differences)  # False for NaN

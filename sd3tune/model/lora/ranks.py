"""Ranks of a LoRA's modules within a budget of parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MOST = 1024
"""The highest rank of a module, as for `method.rank`."""


@dataclass(frozen=True)
class Cost:
    """The trained parameters of one module: `fixed` and, for each rank, `per_rank`."""

    fixed: int
    per_rank: int
    most: int
    """The highest useful rank: the smaller of inputs and outputs."""


def least(costs: Mapping[str, Cost]) -> int:
    """Return the number of parameters at rank 1 everywhere."""
    return sum(cost.fixed + cost.per_rank for cost in costs.values())


def equal_ranks(costs: Mapping[str, Cost], budget: int) -> dict[str, int]:
    """Return nearly equal ranks within a budget of parameters, the same for modules of one name in all blocks."""
    rank = max(1, (budget - least(costs)) // sum(cost.per_rank for cost in costs.values()) + 1)
    ranks = {name: min(rank, cost.most, MOST) for name, cost in costs.items()}
    left = budget - _spent(costs, ranks)
    for kind in dict.fromkeys(_kind(name) for name in costs):
        same = [name for name in costs if _kind(name) == kind and ranks[name] < min(costs[name].most, MOST)]
        price = sum(costs[name].per_rank for name in same)
        if same and price <= left:
            ranks |= {name: ranks[name] + 1 for name in same}
            left -= price
    return ranks


def ranks_by_need(costs: Mapping[str, Cost], needs: Mapping[str, float], budget: int) -> dict[str, int]:
    """Return ranks within a budget of parameters, at least 1 and otherwise in proportion to each module's need.

    The budget's rest goes to the modules that rounding took most from, then to all in the order of their needs.
    """
    free = budget - least(costs)
    price = sum(needs[name] * cost.per_rank for name, cost in costs.items())
    wanted = {name: needs[name] * free / price if price else 0.0 for name in costs}
    ranks = {name: min(1 + int(wanted[name]), cost.most, MOST) for name, cost in costs.items()}
    left = budget - _spent(costs, ranks)
    order = sorted(costs, key=lambda name: (int(wanted[name]) - wanted[name], name))
    given = True
    while given:
        given = False
        for name in order:
            if ranks[name] < min(costs[name].most, MOST) and costs[name].per_rank <= left:
                ranks[name], left, given = ranks[name] + 1, left - costs[name].per_rank, True
        order = sorted(costs, key=lambda name: (-needs[name], name))
    return ranks


def _spent(costs: Mapping[str, Cost], ranks: Mapping[str, int]) -> int:
    return sum(cost.fixed + cost.per_rank * ranks[name] for name, cost in costs.items())


def _kind(name: str) -> str:
    return re.sub(r"^transformer_blocks\.\d+\.", "", name)

"""Cards by name: memory and peak, as their makers publish them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from sd3tune.errors import ConfigError


@dataclass(frozen=True)
class Card:
    """A GPU."""

    name: str
    memory: float
    """GB as it is sold; some drivers show 7 % more bytes than that, which is left as a margin."""
    tflops: float
    """Dense 16-bit matrix products with fp32 sums, TFLOP/s, from the data sheet: no sparsity."""
    bf16: bool = True


CARDS = {
    card.name: card
    for card in (
        Card("h200", 141, 989),
        Card("h100", 80, 989),
        Card("a100", 80, 312),
        Card("a100-40", 40, 312),
        Card("l40s", 48, 362),
        Card("a6000", 48, 155),
        Card("5090", 32, 209),
        Card("4090", 24, 165),
        Card("3090", 24, 71),
        Card("l4", 24, 121),
        Card("a10g", 24, 70),
        Card("v100", 16, 125, bf16=False),
        Card("t4", 16, 65, bf16=False),
    )
}


def find_card(name: str) -> Card:
    """The card of that name. Raises ConfigError."""
    card = CARDS.get(name.lower())
    if card is None:
        close = difflib.get_close_matches(name.lower(), CARDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"--card {name}: unknown; {hint}known are {', '.join(CARDS)}; or give --memory in GB")
    return card

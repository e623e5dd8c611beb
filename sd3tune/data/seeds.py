"""The one source of all random numbers: a function of integers. Needs no torch."""

from __future__ import annotations

import hashlib
import json


def derive(seed: int, *counters: int | str) -> int:
    """A number in [0, 2^63) from all arguments and their order: one seed per purpose, step and slot."""
    canonical = json.dumps([seed, *counters], separators=(",", ":")).encode()
    return int.from_bytes(hashlib.blake2b(canonical, digest_size=8).digest(), "big") >> 1

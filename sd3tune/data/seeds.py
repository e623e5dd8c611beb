"""Derive every seed from integers, without torch."""

from __future__ import annotations

import hashlib
import json

SEEDS = 2**63
"""`derive` returns numbers below it."""


def derive(seed: int, *counters: int | str) -> int:
    """Return a number in [0, 2^63) that depends on all arguments in order: one seed per purpose, step and slot."""
    canonical = json.dumps([seed, *counters], separators=(",", ":")).encode()
    return int.from_bytes(hashlib.blake2b(canonical, digest_size=8).digest(), "big") >> 1

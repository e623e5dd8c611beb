"""The result of an encoding pass, as lines for the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NEW = "new"
CAPTION_CHANGED = "caption changed"
IMAGE_CHANGED = "image changed"
CAPTION_SETTING_CHANGED = "the base, the precision or T5's length changed"
IMAGE_SETTING_CHANGED = "the base, the precision, the resolution or the crops changed"
LOST = "lost from the store"


@dataclass(frozen=True)
class EncodeReport:
    """Counts of texts or images at the start of the pass, and warnings."""

    label: str
    """Name of the records: `captions`, `images`, `class images`, ..."""
    extent: str
    """The amount, such as `2 texts x 3 encoders`."""
    total: int
    reasons: Mapping[str, int]
    """Reason for encoding -> number of texts or images."""
    nbytes: int
    """Bytes added to the store by all processes together."""
    warnings: Sequence[str] = ()

    @property
    def encoded(self) -> int:
        return sum(self.reasons.values())

    @property
    def reused(self) -> int:
        return self.total - self.encoded

    def summary(self) -> str:
        """Return one line, such as `images: 40, all reused` or `images: 12 of 40 re-encoded: image changed`."""
        if not self.encoded:
            return f"{self.label}: {self.extent}, all reused"
        if self.reasons == {NEW: self.total}:
            return f"{self.label}: {self.extent}, all new, {megabytes(self.nbytes)}"
        done = "encoded" if set(self.reasons) == {NEW} else "re-encoded"
        return f"{self.label}: {self.encoded} of {self.total} {done}: {_enumerated(self.reasons)}"

    def lines(self) -> list[str]:
        """Return the summary, then one line per warning."""
        return [self.summary(), *(f"warning: {warning}" for warning in self.warnings)]


def damage_warnings(names: Sequence[str]) -> list[str]:
    """Return a warning that names the images or captions with damaged entries in the store; none without names."""
    if not names:
        return []
    some = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    return [f"{len(names)} damaged in the store, encoded again: {some}"]


def megabytes(nbytes: int) -> str:
    """Format bytes in powers of ten: `3.4 MB`, `12.0 GB`."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _enumerated(reasons: Mapping[str, int]) -> str:
    if len(reasons) == 1:
        return next(iter(reasons))
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())

"""The meaning of a key for a run, declared on the key itself: `lr: Annotated[float, WRITTEN] = Field(...)`.

A run's identity, the adapter's contract, the forecast, the advice on memory and the resolution of paths read it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, Literal


class Identity(Enum):
    """How `--resume` compares a key with the run that it resumes."""

    WRITTEN = auto()
    """As it is written."""
    RESOLVED = auto()
    """By a value that follows from it, such as the fingerprint of the base; the code that compares gives that value."""
    ENCODED = auto()
    """By the encoded images and captions or, in a finished run, whose data may be gone, as it is written."""
    CONTENT = auto()
    """By the encoded images and captions alone: the same files may lie elsewhere."""
    FREE = auto()
    """Not at all: it may change on resuming, as it changes nothing of what is learned but its rounding."""


Phase = Literal["encode", "draw", "train"]
"""The phases of a run that the forecast rehearses: encoding, drawing class images, training with its previews."""


@dataclass(frozen=True)
class Knob:
    """A key that is advised when a run does not fit in memory."""

    eases: tuple[Literal["encode", "load", "train"], ...]
    """What takes less memory: encoding, loading the transformer, training."""
    leaner: tuple[Any, ...] = ()
    """Values that take less, the first to try first; none where the value is computed."""


@dataclass(frozen=True)
class Key:
    """What a key means."""

    identity: Identity
    contract: bool | str = False
    """Whether the adapter's contract states it as it is written; a text is its name there."""
    path: Callable[[str, Path], bool] | None = None
    """Whether a text, written in a file of that folder, is a path; such a path is made absolute."""
    phases: frozenset[Phase] = frozenset[Phase](("draw", "train"))
    """Where the forecast of memory and time may depend on it."""
    knob: Knob | None = None


WRITTEN, FREE, CONTENT, ENCODED, RESOLVED = (
    Key(identity)
    for identity in (Identity.WRITTEN, Identity.FREE, Identity.CONTENT, Identity.ENCODED, Identity.RESOLVED)
)
NO_PHASE, ENCODING, TRAINING = frozenset[Phase](), frozenset[Phase](("encode",)), frozenset[Phase](("train",))
EVERY_PHASE = frozenset[Phase](("encode", "draw", "train"))


def is_any_path(text: str, folder: Path) -> bool:
    """Every text is a path."""
    return True


def looks_like_a_path(text: str) -> bool:
    """Whether a text that may also be a name begins as only paths do."""
    starts = tuple(f"{start}{separator}" for start in (".", "..", "~") for separator in {"/", os.sep})
    return text in (".", "..", "~") or text.startswith(starts) or os.path.isabs(text)

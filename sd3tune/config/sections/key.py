"""The meaning of a key for a run, declared on its field: `lr: Annotated[float, WRITTEN] = Field(...)`.

It is read by a run's identity, the adapter's contract, the forecast, out-of-memory hints and path resolution.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, Literal


class Identity(Enum):
    """How `--resume` compares a key with the resumed run."""

    WRITTEN = auto()
    """By its written value."""
    RESOLVED = auto()
    """By a value derived from it, such as the fingerprint of the base, which the comparing code supplies."""
    ENCODED = auto()
    """By the encoded images and captions; in a finished run, whose data may be deleted, by its written value."""
    CONTENT = auto()
    """Only by the encoded images and captions: the same files may be moved."""
    FREE = auto()
    """Not compared: it may change on resume, as it affects training by rounding at most."""


Phase = Literal["encode", "draw", "train"]
"""The phases of a run that the forecast rehearses: encoding, drawing class images, training with its previews."""


@dataclass(frozen=True)
class Knob:
    """A key to suggest when a run does not fit in memory."""

    eases: tuple[Literal["encode", "load", "train"], ...]
    """Phases that take less memory: encoding, loading the transformer, training."""
    leaner: tuple[Any, ...] = ()
    """Values that take less memory, in the order to try; empty if the value is computed."""


@dataclass(frozen=True)
class Key:
    """The meaning of a key for a run."""

    identity: Identity
    contract: bool | str = False
    """True if the adapter's contract states the written value; a text is the key's name in the contract."""
    of_ranks: bool = False
    """True if the value describes ranks and scales, so that an adapter with other ranks no longer has it."""
    added: bool = False
    """True if earlier versions lack the key: runs are compared without it while it has its default."""
    path: Callable[[str, Path], bool] | None = None
    """Test if a text, in a file of the given folder, is a path; paths are made absolute."""
    phases: frozenset[Phase] = frozenset[Phase](("draw", "train"))
    """Phases whose forecast of memory and time may depend on the key."""
    knob: Knob | None = None


WRITTEN, FREE, CONTENT, ENCODED, RESOLVED = (
    Key(identity)
    for identity in (Identity.WRITTEN, Identity.FREE, Identity.CONTENT, Identity.ENCODED, Identity.RESOLVED)
)
NO_PHASE, ENCODING, TRAINING = frozenset[Phase](), frozenset[Phase](("encode",)), frozenset[Phase](("train",))
EVERY_PHASE = frozenset[Phase](("encode", "draw", "train"))


def is_any_path(text: str, folder: Path) -> bool:
    """Return True: every text is a path."""
    return True


def looks_like_a_path(text: str) -> bool:
    """Return True for a text that begins as only paths do, unlike a Hub id."""
    starts = tuple(f"{start}{separator}" for start in (".", "..", "~") for separator in {"/", os.sep})
    return text in (".", "..", "~") or text.startswith(starts) or os.path.isabs(text)

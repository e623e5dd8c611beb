"""Captions as they are written for an image, and as the text encoders read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Reader = Literal["clip", "t5"]
"""The text encoders that may read a text of their own; `clip` is CLIP-L and CLIP-G."""
READERS: tuple[Reader, Reader] = ("clip", "t5")


@dataclass(frozen=True)
class Caption:
    """A caption, and the texts that replace it for single encoders."""

    text: str
    clip: str | None = None
    t5: str | None = None

    def read_by(self, encoder: str) -> str:
        """Return the text for `clip_l`, `clip_g` or `t5`."""
        own = self.t5 if encoder == "t5" else self.clip
        return self.text if own is None else own

    def map(self, function: Callable[[str], str]) -> Caption:
        """Return the caption with the function applied to each of its texts."""
        own = {reader: function(text) for reader in READERS if (text := getattr(self, reader)) is not None}
        return Caption(function(self.text), **own)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for text in (self.text, self.clip, self.t5) if text is not None))


@dataclass(frozen=True)
class Written:
    """The captions of an image in metadata or columns: any number, and as many or one for single encoders."""

    text: tuple[str, ...] = ()
    clip: tuple[str, ...] = ()
    t5: tuple[str, ...] = ()

    @property
    def plain(self) -> str | Written | None:
        """None without texts, the text if there is only one, for all encoders, else this object."""
        if self.clip or self.t5 or len(self.text) > 1:
            return self
        return self.text[0] if self.text else None


Listed = str | Written | None
"""The captions that a source lists for an image; None if it has none."""


def as_written(listed: Listed) -> Written:
    """Return the captions of any form."""
    if listed is None:
        return Written()
    return Written((listed,)) if isinstance(listed, str) else listed


def as_listed(captions: Sequence[Caption]) -> Listed:
    """Return captions, at least one, in the form that a source lists them; the reverse of `paired`."""
    own = {reader: tuple(getattr(caption, reader) for caption in captions) for reader in READERS}
    given = {reader: texts for reader, texts in own.items() if None not in texts}
    return Written(tuple(caption.text for caption in captions), **given).plain


class UnequalCaptions(ValueError):
    """Captions of single encoders whose number differs from the captions'."""


def paired(written: Written) -> list[Caption]:
    """Return the captions in order; a single text of an encoder belongs to all of them.

    Without `text` it is T5's. Raises UnequalCaptions.
    """
    rows = {name: texts for name, texts in vars(written).items() if texts}
    rows.setdefault("text", rows.get("t5", ()))
    count = max(map(len, rows.values()))
    unequal = {name: len(texts) for name, texts in rows.items() if len(texts) not in (1, count)}
    if unequal:
        name, found = next(iter(unequal.items()))
        raise UnequalCaptions(f"{found} in {column_of(name)} and {count} in another column")
    return [Caption(**{name: texts[number % len(texts)] for name, texts in rows.items()}) for number in range(count)]


def column_of(name: str) -> str:
    """Return the column of `Written`'s field: `text`, `text_clip` or `text_t5`."""
    return name if name == "text" else f"text_{name}"


def lines_of(texts: Sequence[str]) -> tuple[str, ...]:
    """Return each line of each text as a text of its own, without empty lines; an empty text is kept."""
    return tuple(
        line for text in texts for line in [part.strip() for part in text.split("\n") if part.strip()] or [text]
    )

"""The token that textual inversion and pivotal tuning learn."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sd3tune.config.sections.key import TRAINING, Identity, Key
from sd3tune.config.sections.section import Section

_STATED = Key(Identity.WRITTEN, contract=True)
_TRAINING = Key(Identity.WRITTEN, phases=TRAINING)


class LearnedTokenKeys(Section):
    """A new word for CLIP-L and CLIP-G, and its vectors."""

    token: Annotated[str, Field(pattern=r"^\S+$"), _STATED] = Field(
        "<thing>", description="The new token; write it in captions and prompts. It must not be a word that CLIP knows."
    )
    vectors: Annotated[int, _STATED] = Field(
        4, ge=1, le=64, description="Number of vectors; each takes one of CLIP's 75 places for words."
    )
    init: Annotated[str, Field(pattern=r"\S"), _STATED] = Field(
        "thing", description="Words whose embeddings the vectors start from, in turn."
    )
    t5_caption: Annotated[str | None, _STATED] = Field(
        None, description="Words that T5 reads in place of the token, such as its class; null takes `init`."
    )

    @property
    def class_words(self) -> str:
        """The words that T5 and the untrained base read in place of the token."""
        return self.init if self.t5_caption is None else self.t5_caption

    def as_long(self, encoder: str, text: str) -> str:
        """Return a text with as many tokens as the encoder reads for this one."""
        return text.replace(self.token, self.class_words if encoder == "t5" else " ".join("a" * self.vectors))


class PivotConfig(LearnedTokenKeys):
    """The token of pivotal tuning: trained first, then frozen."""

    lr: Annotated[float, _TRAINING] = Field(
        5e-4,
        gt=0,
        description="Peak learning rate of the vectors; it follows `schedule`. With Prodigy, a share of the estimated "
        "rate, such as 1.",
    )
    until: Annotated[float, _TRAINING] = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the steps in which the vectors are trained; they are frozen after it.",
    )

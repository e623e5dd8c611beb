"""`method.text_encoders`: the text encoders that are trained beside an adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sd3tune.config.sections.key import TRAINING, Identity, Key
from sd3tune.config.sections.section import Section

Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[float, Field(gt=0)]
_OF_TEXT = Key(Identity.WRITTEN, phases=TRAINING)


class EncoderLoraConfig(Section):
    """A low-rank adapter on one CLIP text encoder."""

    rank: Annotated[Rank, _OF_TEXT] = Field(16, description="Rank of each adapter pair.")
    alpha: Annotated[Alpha, _OF_TEXT] = Field(16.0, description="The adapter's output is scaled by alpha / rank.")
    lr: Annotated[float, _OF_TEXT] = Field(
        5e-6,
        gt=0,
        description="Peak learning rate of this encoder; it follows `schedule`. With Prodigy, a share of the estimated "
        "rate, such as 0.05.",
    )
    targets: Annotated[Literal["attention", "attention+mlp"], _OF_TEXT] = Field(
        "attention",
        description="`attention`: the q, k, v and output projections; `attention+mlp`: also the feed-forward layers.",
    )


class TrainedEncodersConfig(Section):
    """The trained text encoders. T5 is not trained."""

    clip_l: Annotated[EncoderLoraConfig | None, _OF_TEXT] = Field(
        None, description="Train CLIP-L, in memory 0.25 GB in 16 bits; `{}` for the defaults, null leaves it frozen."
    )
    clip_g: Annotated[EncoderLoraConfig | None, _OF_TEXT] = Field(
        None, description="Train CLIP-G, in memory 1.4 GB in 16 bits; `{}` for the defaults, null leaves it frozen."
    )

    @model_validator(mode="after")
    def _names_an_encoder(self) -> TrainedEncodersConfig:
        if not self.trained:
            raise ValueError("names no encoder to train; write {clip_l: {}, clip_g: {}} for both, or null for none")
        return self

    @property
    def trained(self) -> dict[str, EncoderLoraConfig]:
        """Encoder -> settings, for the trained encoders."""
        every = {"clip_l": self.clip_l, "clip_g": self.clip_g}
        return {name: settings for name, settings in every.items() if settings is not None}

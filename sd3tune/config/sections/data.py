"""`data`: images and captions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from sd3tune.config.sections.key import ENCODED, FREE, Identity, Key, Knob, is_any_path
from sd3tune.config.sections.priors import OwnPredictionConfig
from sd3tune.config.sections.section import Section
from sd3tune.config.sections.sizes import Sizes, each_once, shares_of
from sd3tune.config.sections.sources import (
    DatasetSource,
    FolderSource,
    Source,
    SourceConfig,
    TagsConfig,
    WebDatasetSource,
    one_line,
    placeholders_of,
)
from sd3tune.config.sections.stream import StreamConfig

__all__ = [
    "DataConfig",
    "DatasetSource",
    "FolderSource",
    "Source",
    "SourceConfig",
    "StreamConfig",
    "TagsConfig",
    "WebDatasetSource",
]


class DataConfig(Section):
    """Images and captions, and how images are cropped."""

    sources: list[SourceConfig] = Field(
        min_length=1,
        examples=["[{path: ./photos, caption: a photo of sks dog}]"],
        description="One or more image folders or datasets.",
    )
    trigger: Annotated[str | None, AfterValidator(one_line), Key(Identity.ENCODED, contract=True)] = Field(
        None,
        min_length=1,
        examples=["sks"],
        description="Trigger word or words, put in front of captions that lack it, as in `sks, a dog on a beach`; case "
        "is ignored. Stored with the result.",
    )
    balance: Annotated[
        Literal["equal"] | dict[str, Annotated[float, Field(gt=0)]] | None, Key(Identity.WRITTEN, added=True)
    ] = Field(
        None,
        examples=["equal"],
        description="equal draws each concept equally often, whatever its number of images. Or shares by name, such as "
        "`{dog: 2, toy: 1}`; a concept that is not listed has share 1. null draws each image equally often.",
    )
    export_tags: Annotated[bool, FREE] = Field(
        False,
        description="Store the number of captions per comma-separated tag in the adapter, as `ss_tag_frequency`, from "
        "which A1111 and Forge suggest prompts. Anyone with the file can read the tags.",
    )
    resolution: Annotated[
        Sizes,
        AfterValidator(each_once),
        Key(Identity.WRITTEN, contract=True, knob=Knob(("train",), (1024, 768, 512))),
    ] = Field(
        1024,
        examples=["[512, 768, 1024]"],
        description="Side of the square training crop in pixels, a multiple of 16. In a list of sizes, each image is "
        "used once per epoch in each size, or as often as the size's `share`; previews have the largest size.",
    )
    enlarge: Annotated[bool | None, Key(Identity.ENCODED, added=True)] = Field(
        None,
        description="Enlarge images that are smaller than their crop, with a warning. false leaves them out of that "
        "size; a warning counts them. null enlarges in a run with a single size and leaves out in others.",
    )
    buckets: Annotated[bool, Key(Identity.ENCODED, contract=True)] = Field(
        True,
        description="Crop each image to the nearest of several aspect ratios with the square's area; each batch has "
        "one shape. false crops all images to the square.",
    )
    crop_variants: Annotated[int, ENCODED] = Field(
        1,
        ge=1,
        le=64,
        description="Crops per image: the first is centred, others are random; each is encoded once.",
    )
    flip: Annotated[bool, ENCODED] = Field(
        False, description="Also train on mirrored images, encoded as additional variants."
    )
    caption_dropout: Annotated[float, Key(Identity.WRITTEN, contract=True)] = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of samples trained with the empty caption, for classifier-free guidance.",
    )
    encoder_dropout: Annotated[float, Key(Identity.WRITTEN, contract=True)] = Field(
        0.0,
        ge=0,
        le=1,
        description="Probability of zeroing a text encoder's output, independent for each sample and encoder.",
    )
    cache_dir: Annotated[str | None, Key(Identity.FREE, path=is_any_path)] = Field(
        None,
        description="Folder for encoded captions and images, shared by runs; null: `$SD3TUNE_CACHE`, else "
        "`.cache/sd3tune` next to the run folder's parent.",
    )

    stream: Annotated[StreamConfig | None, FREE] = Field(
        None,
        examples=["{buffer: 8}"],
        description="Settings of sources that are read while training: `kind: webdataset`, and datasets with "
        "`streaming`. null uses the defaults.",
    )

    def trigger_of(self, source: int) -> str | None:
        """Return the trigger of a source."""
        return self.sources[source].trigger or self.trigger

    def sizes_of(self, source: int) -> list[tuple[int, int]]:
        """Return (side of the square in pixels, share) of each size of a source."""
        return shares_of(self.sources[source].resolution or self.resolution)

    @property
    def sides(self) -> list[int]:
        """Sides of the squares of all sizes of the run, in pixels, ascending."""
        return sorted({side for number in range(len(self.sources)) for side, _ in self.sizes_of(number)})

    @property
    def side(self) -> int:
        """Side of the largest size, in pixels: the size of previews."""
        return self.sides[-1]

    @property
    def enlarges(self) -> bool:
        """True if images that are smaller than their crop are enlarged."""
        return len(self.sides) == 1 if self.enlarge is None else self.enlarge

    @property
    def own_predictions(self) -> dict[int, OwnPredictionConfig]:
        """Source number -> prior, for priors with weight above 0 that preserve the base's own prediction."""
        return {
            n: own for n, source in enumerate(self.sources) if source.prior and (own := source.prior.own_prediction)
        }

    @property
    def streams(self) -> bool:
        """True if the images are read and encoded while training."""
        return any(source.streams for source in self.sources)

    @model_validator(mode="after")
    def _stream_only(self) -> DataConfig:
        if not self.streams:
            if self.stream is not None:
                raise ValueError("stream: no source is a stream; set kind: webdataset, or streaming: true of a dataset")
            return self
        for number, source in enumerate(self.sources):
            if not source.streams:
                raise ValueError(f"sources.{number} is no stream, and others are; use the one or the other in a run")
        if self.balance is not None:
            raise ValueError("balance: has no effect on streams, whose concepts are not counted; leave it out")
        if len(self.sides) > 1:
            raise ValueError("resolution: a stream has one size; name one")
        return self

    @model_validator(mode="after")
    def _template_trigger_is_set(self) -> DataConfig:
        for number, source in enumerate(self.sources):
            if self.trigger_of(number) is None and "trigger" in placeholders_of(source.template):
                raise ValueError(f"sources.{number}.template has {{trigger}}, but data.trigger is not set")
        return self

    @property
    def drift_limit(self) -> float | None:
        """The limit on the change of the preserved predictions; None without one."""
        limits = {prior.drift_limit for prior in self.own_predictions.values()}
        return next(iter(limits), None)

    @model_validator(mode="after")
    def _one_drift_limit(self) -> DataConfig:
        limits = {number: prior.drift_limit for number, prior in self.own_predictions.items()}
        first = next(iter(limits), 0)
        for number, limit in limits.items():
            if limit != limits[first]:
                raise ValueError(
                    f"sources.{number}.prior.drift_limit and sources.{first}.prior.drift_limit differ; one limit holds "
                    "for the whole run, so give both the same"
                )
        return self

    @model_validator(mode="after")
    def _balanced_concepts_exist(self) -> DataConfig:
        names = {source.name for source in self.sources if source.name is not None}
        for name in self.balance if isinstance(self.balance, dict) else ():
            if name not in names:
                known = f"the names are {', '.join(sorted(names))}" if names else "no source has a name"
                raise ValueError(f"balance: {name!r} is not the name of a source; {known}")
        return self

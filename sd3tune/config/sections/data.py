"""`data`: images and captions."""

from __future__ import annotations

import os
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field, field_validator, model_validator

from sd3tune.config.sections.key import CONTENT, ENCODED, FREE, Identity, Key, Knob, is_any_path, looks_like_a_path
from sd3tune.config.sections.masks import MaskColumn, Masks, MasksOfDataset, OutsideTarget, OutsideWeight
from sd3tune.config.sections.priors import OwnPredictionConfig, PriorConfig
from sd3tune.config.sections.section import Section
from sd3tune.config.sections.sizes import Sizes, each_once, shares_of


def _placeholders(template: str | None) -> set[str]:
    """Return the names in braces, with format and conversion. Raises ValueError for unbalanced braces."""
    fields = Formatter().parse(template or "")
    return {
        name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        for _, name, form, conversion in fields
        if name is not None
    }


def _is_dataset_path(text: str, folder: Path) -> bool:
    """Return True for a file or folder, and False for a dataset of the Hub."""
    return text.endswith(".parquet") or looks_like_a_path(text) or os.path.exists(folder / text)


_FOLDER, _DATASET = Key(Identity.CONTENT, path=is_any_path), Key(Identity.CONTENT, path=_is_dataset_path)


def _one_line(text: str | None) -> str | None:
    if text is not None and (text != text.strip() or not text.isprintable()):
        raise ValueError("has spaces around it or line breaks in it; remove them")
    return text


class TagsConfig(Section):
    """Captions are tags, which variants shuffle and drop."""

    separator: Annotated[str, CONTENT] = Field(",", min_length=1, description="Text between two tags.")
    shuffle: Annotated[bool, CONTENT] = Field(True, description="Give the tags another order in each variant.")
    keep: Annotated[int, CONTENT] = Field(
        0, ge=0, description="Number of first tags that stay first and are never dropped, such as the subject's name."
    )
    dropout: Annotated[float, CONTENT] = Field(
        0.0, ge=0, le=1, description="Probability of leaving out a tag, independent for each tag and variant."
    )


class Source(Section):
    """Fields shared by all sources."""

    kind: str
    path: Annotated[str, _FOLDER] = Field(min_length=1, examples=["./photos"], description="Location of the images.")
    name: Annotated[str | None, AfterValidator(_one_line), CONTENT] = Field(
        None,
        min_length=1,
        description="Name of the concept, such as a subject, for `data.balance`, metrics and the card. Sources with "
        "the same name are one concept; a source without a name is one by itself.",
    )
    trigger: Annotated[str | None, AfterValidator(_one_line), CONTENT] = Field(
        None, min_length=1, description="Trigger word or words of this source; null uses `data.trigger`."
    )
    caption: Annotated[str | None, CONTENT] = Field(None, description="Caption for images without their own.")
    captions: Annotated[Literal["one", "lines"], CONTENT] = Field(
        "one",
        description="lines makes each line of a caption file, a column or `caption` a caption of its own. Of several, "
        "each step draws one; previews have their own prompts, and the held-out loss uses the first.",
    )
    tags: Annotated[TagsConfig | None, CONTENT] = Field(
        None, description="Shuffle and drop the tags of captions; texts of T5's own stay as they are."
    )
    wildcards: Annotated[bool, CONTENT] = Field(
        False,
        description="Replace `{a|b}` in captions by one of the alternatives, as in sd-scripts and Dynamic Prompts; "
        "they may be nested, 16 deep. The held-out loss uses the first ones.",
    )
    variants: Annotated[int, CONTENT] = Field(
        8,
        ge=1,
        le=10_000,
        description="Variants per caption with `tags` or `wildcards`, drawn from the seed. Each different one is "
        "encoded once; `sd3tune plan` shows the disk space.",
    )
    template: Annotated[str | None, CONTENT] = Field(
        None,
        examples=['"a photo of {trigger}: {caption}"'],
        description="Template for every caption of the source: `{caption}` is the caption, `{trigger}` is "
        "`data.trigger`, which is then not added elsewhere. null only applies `data.trigger`.",
    )
    repeats: Annotated[int, CONTENT] = Field(
        1, ge=1, description="Number of times each image of this source is used per epoch."
    )
    weight: Annotated[float, CONTENT] = Field(
        1.0, gt=0, description="Loss weight of this source's images; it does not change how often they are used."
    )
    masks: Masks = None
    outside_weight: OutsideWeight = 0.1
    outside_target: OutsideTarget = "image"
    max_samples: Annotated[int | None, CONTENT] = Field(
        None, ge=1, description="Maximum number of the source's images, always the same ones; null uses all."
    )
    resolution: Annotated[Sizes | None, AfterValidator(each_once), CONTENT] = Field(
        None, description="Sizes of this source's images, written like `data.resolution`; null uses that."
    )
    prior: Annotated[PriorConfig | None, CONTENT] = Field(
        None,
        description="Prior preservation: keeps the class from turning into the subject. It needs prompts for your "
        "data, and doubles the time per step.",
    )

    @field_validator("template")
    @classmethod
    def _known_placeholders(cls, template: str | None) -> str | None:
        try:
            unknown = _placeholders(template) - {"caption", "trigger"}
        except ValueError:
            raise ValueError("has a single brace; write {{ or }} for a literal brace") from None
        if unknown:
            raise ValueError(f"has {{{min(unknown)}}}; the placeholders are {{caption}} and {{trigger}}")
        return template


class FolderSource(Source):
    """A folder of images. A caption comes from `metadata.jsonl` or `metadata.csv` in the folder (columns `file_name`
    and `text`), else from a caption file, else from `caption`. The caption file of `dog.jpg` is the first of `dog.txt`,
    `dog.jpg.txt`, `dog.caption` and `dog.jpg.caption`; case and Unicode normalisation of names are ignored. The columns
    `text_clip` and `text_t5`, or the files `dog.clip.txt` and `dog.t5.txt`, replace the caption for these encoders.
    Warnings list unreadable images, subfolders with images, and other files that look like captions.
    """

    kind: Annotated[Literal["folder"], CONTENT] = Field("folder", description="A folder of images.")
    recursive: Annotated[bool, CONTENT] = Field(
        False,
        description="Also read the subfolders and theirs, each with its own metadata and caption files. Hidden ones "
        "are skipped, and links to folders are not followed. Messages name an image by its path in the source.",
    )
    layout: Annotated[Literal["plain", "kohya"], CONTENT] = Field(
        "plain",
        description="kohya reads the subfolders with names such as `10_sks dog`: 10 repeats, times `repeats`, and the "
        "caption `sks dog` for images without their own. It reads nothing else; warnings list it.",
    )


class DatasetSource(Source):
    """A dataset read by the `datasets` library. Its rows hold images, or paths inside the dataset's folder."""

    kind: Annotated[Literal["dataset"], CONTENT] = Field("dataset", description="A Hub dataset or a local dataset.")
    path: Annotated[str, _DATASET] = Field(
        min_length=1,
        examples=["./train.parquet"],
        description="A `.parquet` file (or a pattern such as `train-*.parquet`), a folder (from `save_to_disk`, or one "
        "that `load_dataset` reads), or a Hub id.",
    )
    split: Annotated[str, CONTENT] = Field(
        "train", min_length=1, description="Split to use; no effect on a dataset without splits."
    )
    revision: Annotated[str | None, CONTENT] = Field(
        None, description="Branch, tag or commit of a Hub dataset; null uses its main branch."
    )
    image_column: Annotated[str, CONTENT] = Field("image", min_length=1, description="Column with the images.")
    caption_column: Annotated[str | None, CONTENT] = Field(
        "text",
        min_length=1,
        description="Column with the captions: text, lists of texts, or class labels, whose names are used. null uses "
        "`caption` for all.",
    )
    clip_column: Annotated[str | None, CONTENT] = Field(
        None, min_length=1, description="Column with texts that only CLIP reads; null: `text_clip`, if there is one."
    )
    t5_column: Annotated[str | None, CONTENT] = Field(
        None, min_length=1, description="Column with texts that only T5 reads; null: `text_t5`, if there is one."
    )
    masks: MasksOfDataset = None
    mask_column: MaskColumn = None
    class_names: Annotated[list[str] | None, CONTENT] = Field(
        None,
        min_length=1,
        examples=["[T-shirt, trousers, pullover]"],
        description="Names of the classes 0, 1, ..., if `caption_column` holds whole numbers. null uses the dataset's "
        "own names. `template` makes captions of them.",
    )


SourceConfig: TypeAlias = Annotated[FolderSource | DatasetSource, Field(discriminator="kind")]


class DataConfig(Section):
    """Images and captions, and how images are cropped."""

    sources: list[SourceConfig] = Field(
        min_length=1,
        examples=["[{path: ./photos, caption: a photo of sks dog}]"],
        description="One or more image folders or datasets.",
    )
    trigger: Annotated[str | None, AfterValidator(_one_line), Key(Identity.ENCODED, contract=True)] = Field(
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

    @model_validator(mode="after")
    def _template_trigger_is_set(self) -> DataConfig:
        for number, source in enumerate(self.sources):
            if self.trigger_of(number) is None and "trigger" in _placeholders(source.template):
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

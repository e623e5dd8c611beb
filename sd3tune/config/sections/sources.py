"""The kinds of source in `data.sources`."""

from __future__ import annotations

import os
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from sd3tune.config.sections.key import CONTENT, Identity, Key, is_any_path, looks_like_a_path
from sd3tune.config.sections.masks import MaskColumn, Masks, MasksOfDataset, OutsideTarget, OutsideWeight
from sd3tune.config.sections.priors import PriorConfig
from sd3tune.config.sections.section import Section
from sd3tune.config.sections.sizes import Sizes, each_once


def placeholders_of(template: str | None) -> set[str]:
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


def _is_local(text: str, folder: Path) -> bool:
    return "://" not in text


_FOLDER, _DATASET = Key(Identity.CONTENT, path=is_any_path), Key(Identity.CONTENT, path=_is_dataset_path)
_SHARDS = Key(Identity.CONTENT, path=_is_local)


def one_line(text: str | None) -> str | None:
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
    name: Annotated[str | None, AfterValidator(one_line), CONTENT] = Field(
        None,
        min_length=1,
        description="Name of the concept, such as a subject, for `data.balance`, metrics and the card. Sources with "
        "the same name are one concept; a source without a name is one by itself.",
    )
    trigger: Annotated[str | None, AfterValidator(one_line), CONTENT] = Field(
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

    @property
    def streams(self) -> bool:
        """True if the images are read and encoded while training."""
        return False

    @field_validator("template")
    @classmethod
    def _known_placeholders(cls, template: str | None) -> str | None:
        try:
            unknown = placeholders_of(template) - {"caption", "trigger"}
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
    streaming: Annotated[bool, CONTENT] = Field(
        False, description="Read the rows while training, as `data.stream` says, instead of downloading the dataset."
    )

    @property
    def streams(self) -> bool:
        return self.streaming

    @model_validator(mode="after")
    def _streamed_alone(self) -> DatasetSource:
        return only_streamed(self) if self.streaming else self


class WebDatasetSource(Source):
    """Tar files (shards) of samples, read while training. A sample is the files with one name up to its first dot:
    `0001.jpg` with `0001.txt`, `0001.json` or `0001.cls`.
    """

    kind: Annotated[Literal["webdataset"], CONTENT] = Field("webdataset", description="Shards in WebDataset's format.")
    path: Annotated[str, _SHARDS] = Field(
        min_length=1,
        examples=["'./shards/{000..099}.tar'"],
        description="Shards: a tar file, a folder of them, or a pattern with `{000..099}`, `{a,b}` or `*`. A URL has a "
        "scheme of fsspec, such as `https://` or `s3://`.",
    )
    caption_field: Annotated[str, CONTENT] = Field(
        "caption",
        min_length=1,
        description="Field of `.json` files with the caption, a text or a list of texts; a `.txt` file comes first. "
        "The fields `text_clip` and `text_t5` replace it for these encoders.",
    )
    class_names: Annotated[list[str] | None, CONTENT] = Field(
        None,
        min_length=1,
        examples=["[T-shirt, trousers, pullover]"],
        description="Names of the classes 0, 1, ... in `.cls` files, which are captions then.",
    )

    @property
    def streams(self) -> bool:
        return True

    @model_validator(mode="after")
    def _streamed_alone(self) -> WebDatasetSource:
        return only_streamed(self)


_Streamed = TypeVar("_Streamed", bound=Source)


def only_streamed(source: _Streamed) -> _Streamed:
    """Return the source. Raises ValueError for keys that a stream cannot follow."""
    given = {"repeats": 1, "masks": None, "max_samples": None, "resolution": None, "prior": None}
    for name, default in given.items():
        if getattr(source, name) != default:
            raise ValueError(f"{name}: does not apply to a stream; leave it out, or use a folder or a dataset")
    return source


SourceConfig: TypeAlias = Annotated[FolderSource | DatasetSource | WebDatasetSource, Field(discriminator="kind")]

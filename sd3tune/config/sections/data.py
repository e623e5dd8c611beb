"""`data`: images and captions."""

from __future__ import annotations

import os
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from sd3tune.config.sections.key import CONTENT, ENCODED, FREE, Identity, Key, Knob, is_any_path, looks_like_a_path
from sd3tune.config.sections.section import Section


def _placeholders(template: str | None) -> set[str]:
    """The names in braces, format and conversion included; ValueError for unbalanced braces."""
    fields = Formatter().parse(template or "")
    return {
        name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        for _, name, form, conversion in fields
        if name is not None
    }


def _is_dataset_path(text: str, folder: Path) -> bool:
    """Whether it means a file or folder rather than a dataset of the Hub."""
    return text.endswith(".parquet") or looks_like_a_path(text) or os.path.exists(folder / text)


_FOLDER, _DATASET = Key(Identity.CONTENT, path=is_any_path), Key(Identity.CONTENT, path=_is_dataset_path)

Prompt = Annotated[str, Field(min_length=1)]


class Prior(Section):
    """What all kinds of prior have."""

    kind: str
    prompt: Annotated[Prompt | Annotated[list[Prompt], Field(min_length=1)], CONTENT] = Field(
        examples=["a photo of a dog", "[a photo of a dog, a puppy on a beach]"],
        description="Caption of the class: the source's without what makes it special. Or a list of them, each used "
        "equally often: what they name is kept best.",
    )
    weight: Annotated[float, CONTENT] = Field(
        1.0, ge=0, description="Factor on the loss of what is kept; 0 leaves the prior out."
    )

    @field_validator("prompt")
    @classmethod
    def _each_once(cls, prompt: str | list[str]) -> str | list[str]:
        if isinstance(prompt, list) and (twice := next((one for one in prompt if prompt.count(one) > 1), None)):
            raise ValueError(f"has {twice!r} more than once; each prompt is used equally often, so name it once")
        return prompt

    @property
    def prompts(self) -> list[str]:
        """At least one."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def class_images(self) -> ClassImagesConfig | None:
        """Itself, where it keeps the class by pictures and counts."""
        return None

    @property
    def own_prediction(self) -> OwnPredictionConfig | None:
        """Itself, where it keeps the base's own prediction and counts."""
        return None


class ClassImagesConfig(Prior):
    """Pictures of the class are trained beside the source's own, each with its caption (DreamBooth, Ruiz et al. 2022):
    loss = mean(instances) + weight * mean(class).
    """

    kind: Annotated[Literal["images"], CONTENT] = Field("images", description="Keep the class as its pictures show it.")
    images: Annotated[int, CONTENT] = Field(
        100,
        ge=0,
        description="How many class images; what the folder lacks is drawn by the base before training, in the shapes "
        "of the source's buckets, the prompts in turns.",
    )
    path: Annotated[str | None, _FOLDER] = Field(
        None,
        min_length=1,
        description="Folder of class images, your own (a `.txt` beside one is its caption, else the first prompt) and "
        "those that are drawn; null keeps drawn ones beside the store, shared by runs.",
    )
    steps: Annotated[int, CONTENT] = Field(
        28, ge=1, le=1000, description="Denoising steps of a class image that is drawn."
    )
    guidance: Annotated[float, CONTENT] = Field(
        7.0, ge=0, description="Its classifier-free guidance scale; 1 or less turns it off."
    )

    @property
    def class_images(self) -> ClassImagesConfig | None:
        return self if self.weight > 0 else None

    @model_validator(mode="after")
    def _each_prompt_is_drawn(self) -> ClassImagesConfig:
        if self.weight > 0 and 0 < self.images < len(self.prompts):
            raise ValueError(
                f"images is {self.images} but there are {len(self.prompts)} prompts; draw one of each or more"
            )
        return self


class OwnPredictionConfig(Prior):
    """Without class images: on the same noisy latents, under the class caption, the base's own prediction is
    the target. A step computes two batches more instead of one.
    """

    kind: Annotated[Literal["prediction"], CONTENT] = Field(
        "prediction", description="Keep what the base predicts for the class."
    )

    @property
    def own_prediction(self) -> OwnPredictionConfig | None:
        return self if self.weight > 0 else None


PriorConfig: TypeAlias = Annotated[ClassImagesConfig | OwnPredictionConfig, Field(discriminator="kind")]


class Source(Section):
    """What all kinds of source have."""

    kind: str
    path: Annotated[str, _FOLDER] = Field(min_length=1, examples=["./photos"], description="Where the images are.")
    caption: Annotated[str | None, CONTENT] = Field(
        None, description="Caption of the images that have none of their own."
    )
    template: Annotated[str | None, CONTENT] = Field(
        None,
        examples=['"a photo of {trigger}: {caption}"'],
        description="Rewrites every caption of the source: `{caption}` stands for it, `{trigger}` for `data.trigger`, "
        "which is then put nowhere else; null leaves captions to `data.trigger`.",
    )
    repeats: Annotated[int, CONTENT] = Field(
        1, ge=1, description="How often each image of this source is seen per epoch."
    )
    weight: Annotated[float, CONTENT] = Field(
        1.0, gt=0, description="Factor on the loss of this source's images; how often they are seen stays the same."
    )
    max_samples: Annotated[int | None, CONTENT] = Field(
        None, ge=1, description="Use this many of the source's images, always the same ones; null uses all."
    )
    prior: Annotated[PriorConfig | None, CONTENT] = Field(
        None,
        description="Prior preservation: keeps the class from turning into the subject. null, the default, is none: it "
        "needs prompts that you alone know, and doubles the time of a step.",
    )

    @field_validator("template")
    @classmethod
    def _known_placeholders(cls, template: str | None) -> str | None:
        try:
            unknown = _placeholders(template) - {"caption", "trigger"}
        except ValueError:
            raise ValueError("has a single brace; write {{ or }} for one that is not a placeholder's") from None
        if unknown:
            raise ValueError(f"has {{{min(unknown)}}}; the placeholders are {{caption}} and {{trigger}}")
        return template


class FolderSource(Source):
    """A folder of images. A caption is taken from `metadata.jsonl` or `metadata.csv` in the folder (columns `file_name`
    and `text`), else from a file beside the image, else from `caption`. For `dog.jpg` that file is the first of
    `dog.txt`, `dog.jpg.txt`, `dog.caption` and `dog.jpg.caption`; upper and lower case are the same, and so are the
    Unicode forms of a name. Pictures that cannot be read, subfolders with pictures, and other files that look like
    captions are named in a warning.
    """

    kind: Annotated[Literal["folder"], CONTENT] = Field("folder", description="A folder of images.")


class DatasetSource(Source):
    """A dataset as the `datasets` library reads it. Its rows hold the pictures, or paths below the dataset's folder."""

    kind: Annotated[Literal["dataset"], CONTENT] = Field(
        "dataset", description="A dataset of the Hub or of this machine."
    )
    path: Annotated[str, _DATASET] = Field(
        min_length=1,
        examples=["./train.parquet"],
        description="A `.parquet` file (or a pattern such as `train-*.parquet`), a folder (from `save_to_disk`, or one "
        "that `load_dataset` reads), or a Hub id.",
    )
    split: Annotated[str, CONTENT] = Field(
        "train", min_length=1, description="Which split; it has no effect on a dataset without splits."
    )
    revision: Annotated[str | None, CONTENT] = Field(
        None, description="Branch, tag or commit of a Hub dataset; null takes its main branch."
    )
    image_column: Annotated[str, CONTENT] = Field(
        "image", min_length=1, description="The column that holds the images."
    )
    caption_column: Annotated[str | None, CONTENT] = Field(
        "text",
        min_length=1,
        description="The column that holds the captions, as text or as class labels, whose names are taken; null takes "
        "`caption` for all.",
    )


SourceConfig: TypeAlias = Annotated[FolderSource | DatasetSource, Field(discriminator="kind")]


class DataConfig(Section):
    """Images and captions, and how they are cut."""

    sources: list[SourceConfig] = Field(
        min_length=1,
        examples=["[{path: ./photos, caption: a photo of sks dog}]"],
        description="One or more folders of images, or datasets.",
    )
    trigger: Annotated[str | None, Key(Identity.ENCODED, contract=True)] = Field(
        None,
        min_length=1,
        examples=["sks"],
        description="A word, or a few, put in front of captions that lack it, as in `sks, a dog on a beach`; upper and "
        "lower case count as the same. Stored with the result.",
    )
    export_tags: Annotated[bool, FREE] = Field(
        False,
        description="Store with the adapter how many captions have each tag, a text between commas: "
        "`ss_tag_frequency`, from which A1111 and Forge suggest prompts. Whoever gets the file can read the tags.",
    )
    resolution: Annotated[int, Key(Identity.WRITTEN, contract=True, knob=Knob(("train",), (1024, 768, 512)))] = Field(
        1024,
        ge=16,
        le=4096,
        description="Side of the square training crop in pixels, a multiple of 16; previews are that square.",
    )
    buckets: Annotated[bool, Key(Identity.ENCODED, contract=True)] = Field(
        True,
        description="Cut each image to the nearest of a few shapes of the square's area instead of to the square; a "
        "batch holds one shape. false cuts squares only.",
    )
    crop_variants: Annotated[int, ENCODED] = Field(
        1,
        ge=1,
        le=64,
        description="Crops per image: the first is centred, more are random; each is encoded once.",
    )
    flip: Annotated[bool, ENCODED] = Field(
        False, description="Also train on mirrored images, encoded as further variants."
    )
    caption_dropout: Annotated[float, Key(Identity.WRITTEN, contract=True)] = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of samples trained with the empty caption, which classifier-free guidance starts from.",
    )
    encoder_dropout: Annotated[float, Key(Identity.WRITTEN, contract=True)] = Field(
        0.0,
        ge=0,
        le=1,
        description="Chance that a text encoder's output is zeros, for each sample and encoder by itself.",
    )
    cache_dir: Annotated[str | None, Key(Identity.FREE, path=is_any_path)] = Field(
        None,
        description="Where encoded captions and images are kept, shared by runs; null: `$SD3TUNE_CACHE`, "
        "else `.cache/sd3tune` beside the run folder's parent.",
    )

    @property
    def own_predictions(self) -> dict[int, OwnPredictionConfig]:
        """By the number of the source: the priors that keep the base's own prediction, and count."""
        return {n: own for n, of in enumerate(self.sources) if of.prior and (own := of.prior.own_prediction)}

    @field_validator("trigger")
    @classmethod
    def _one_line(cls, trigger: str | None) -> str | None:
        if trigger is not None and (trigger != trigger.strip() or not trigger.isprintable()):
            raise ValueError("has spaces around it or line breaks in it; remove them")
        return trigger

    @model_validator(mode="after")
    def _trigger_is_there(self) -> DataConfig:
        for number, source in enumerate(self.sources):
            if self.trigger is None and "trigger" in _placeholders(source.template):
                raise ValueError(f"sources.{number}.template has {{trigger}}, but data.trigger is not set")
        return self

    @field_validator("resolution")
    @classmethod
    def _multiple_of_16(cls, resolution: int) -> int:
        if resolution % 16:
            low = resolution // 16 * 16
            raise ValueError(f"must be a multiple of 16 (8x VAE, 2x2 patches); {low} or {low + 16} would do")
        return resolution

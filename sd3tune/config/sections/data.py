"""`data`: images and captions."""

from __future__ import annotations

import os
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from sd3tune.config.sections.key import CONTENT, ENCODED, FREE, Identity, Key, Knob, is_any_path, looks_like_a_path
from sd3tune.config.sections.masks import MaskColumn, Masks, MasksOfDataset, OutsideTarget, OutsideWeight
from sd3tune.config.sections.section import Section


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

Prompt = Annotated[str, Field(min_length=1)]


class Prior(Section):
    """Fields shared by all priors."""

    kind: str
    prompt: Annotated[Prompt | Annotated[list[Prompt], Field(min_length=1)], CONTENT] = Field(
        examples=["a photo of a dog", "[a photo of a dog, a puppy on a beach]"],
        description="Caption of the class: the source's caption without its special words. Or a list of captions, each "
        "used equally often; the classes that they name are preserved best.",
    )
    weight: Annotated[float, CONTENT] = Field(
        1.0, ge=0, description="Weight of the prior's loss; 0 turns the prior off."
    )

    @field_validator("prompt")
    @classmethod
    def _unique_prompts(cls, prompt: str | list[str]) -> str | list[str]:
        if isinstance(prompt, list) and (twice := next((one for one in prompt if prompt.count(one) > 1), None)):
            raise ValueError(f"has {twice!r} more than once; each prompt is used equally often, so list it once")
        return prompt

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list, at least one."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def class_images(self) -> ClassImagesConfig | None:
        """The prior itself if it uses class images and its weight is above 0, else None."""
        return None

    @property
    def own_prediction(self) -> OwnPredictionConfig | None:
        """The prior itself if it uses the base's own prediction and its weight is above 0, else None."""
        return None


class ClassImagesConfig(Prior):
    """Train on class images together with the source's images, each with its caption (DreamBooth, Ruiz et al. 2022).
    The loss is (sum of instances + weight * sum of class images) / number of instances.
    """

    kind: Annotated[Literal["images"], CONTENT] = Field("images", description="Preserve the class with class images.")
    images: Annotated[int, CONTENT] = Field(
        100,
        ge=0,
        description="Number of class images. The base draws missing ones before training, in the source's bucket "
        "shapes, cycling through the prompts.",
    )
    path: Annotated[str | None, _FOLDER] = Field(
        None,
        min_length=1,
        description="Folder of class images, both your own and drawn ones. The caption of an image is its `.txt` file, "
        "else the first prompt. null keeps drawn images next to the store, shared by runs.",
    )
    steps: Annotated[int, CONTENT] = Field(28, ge=1, le=1000, description="Denoising steps per drawn class image.")
    guidance: Annotated[float, CONTENT] = Field(
        7.0, ge=0, description="Classifier-free guidance scale of drawn class images; 1 or less turns it off."
    )

    @property
    def class_images(self) -> ClassImagesConfig | None:
        return self if self.weight > 0 else None

    @model_validator(mode="after")
    def _enough_images_for_all_prompts(self) -> ClassImagesConfig:
        if self.weight > 0 and 0 < self.images < len(self.prompts):
            raise ValueError(
                f"images is {self.images} but there are {len(self.prompts)} prompts; use at least one image per prompt"
            )
        return self


class OwnPredictionConfig(Prior):
    """Preserve the base's prediction without class images: it is the target for the same noisy latents with the class
    caption. A step computes two more batches instead of one.
    """

    kind: Annotated[Literal["prediction"], CONTENT] = Field(
        "prediction", description="Preserve the base's prediction for the class."
    )

    @property
    def own_prediction(self) -> OwnPredictionConfig | None:
        return self if self.weight > 0 else None


PriorConfig: TypeAlias = Annotated[ClassImagesConfig | OwnPredictionConfig, Field(discriminator="kind")]


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
    trigger: Annotated[str | None, Key(Identity.ENCODED, contract=True)] = Field(
        None,
        min_length=1,
        examples=["sks"],
        description="Trigger word or words, put in front of captions that lack it, as in `sks, a dog on a beach`; case "
        "is ignored. Stored with the result.",
    )
    export_tags: Annotated[bool, FREE] = Field(
        False,
        description="Store the number of captions per comma-separated tag in the adapter, as `ss_tag_frequency`, from "
        "which A1111 and Forge suggest prompts. Anyone with the file can read the tags.",
    )
    resolution: Annotated[int, Key(Identity.WRITTEN, contract=True, knob=Knob(("train",), (1024, 768, 512)))] = Field(
        1024,
        ge=16,
        le=4096,
        description="Side of the square training crop in pixels, a multiple of 16; previews have the same size.",
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

    @property
    def own_predictions(self) -> dict[int, OwnPredictionConfig]:
        """Source number -> prior, for priors with weight above 0 that preserve the base's own prediction."""
        return {
            n: own for n, source in enumerate(self.sources) if source.prior and (own := source.prior.own_prediction)
        }

    @field_validator("trigger")
    @classmethod
    def _one_line(cls, trigger: str | None) -> str | None:
        if trigger is not None and (trigger != trigger.strip() or not trigger.isprintable()):
            raise ValueError("has spaces around it or line breaks in it; remove them")
        return trigger

    @model_validator(mode="after")
    def _template_trigger_is_set(self) -> DataConfig:
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

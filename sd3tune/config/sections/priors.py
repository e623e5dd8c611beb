"""`prior`: preserving the class of a source's images."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from sd3tune.config.sections.key import CONTENT, Identity, Key, is_any_path
from sd3tune.config.sections.section import Section

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
    path: Annotated[str | None, Key(Identity.CONTENT, path=is_any_path)] = Field(
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
    captions_without: Annotated[Prompt | None, CONTENT] = Field(
        None,
        examples=["sks"],
        description="The subject's name in the captions. The source's own captions without it are preserved, too, each "
        "as often as `prompt`: without `sks`, `a photo of sks dog on a beach` is `a photo of dog on a beach`.",
    )
    drift_limit: Annotated[float | None, CONTENT] = Field(
        None,
        gt=0,
        le=1,
        examples=[0.05],
        description="Most that the preserved predictions may change on average, as a share of their size, such as "
        "0.05. The weight is then steered between 1/64 and 64 times `weight`: it falls while they change less, and "
        "rises while they change more. null keeps it constant. `metrics.jsonl` has `drift` and `prior_weight`.",
    )

    @property
    def own_prediction(self) -> OwnPredictionConfig | None:
        return self if self.weight > 0 else None


PriorConfig: TypeAlias = Annotated[ClassImagesConfig | OwnPredictionConfig, Field(discriminator="kind")]

"""`checkpoint`, `preview`, `validation`, `eval`, `tracking` and `hub`: the outputs of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sd3tune.config.sections.key import FREE, Identity, Key, is_any_path, looks_like_a_path
from sd3tune.config.sections.section import Section

REPO_ID = re.compile(r"^(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?$", re.ASCII)
REPO_ID_IN_WORDS = "write user/name, of letters, digits, '.', '_' and '-', no two '-' or '.' in a row"


def _is_local(text: str, folder: Path) -> bool:
    """Return True for a folder, and False for a Hub id."""
    return looks_like_a_path(text) or (folder / text).exists()


class CheckpointConfig(Section):
    """Checkpoints, from which a stopped run resumes."""

    every: Annotated[int, FREE] = Field(
        500, ge=1, description="Steps between checkpoints; the last step is always saved."
    )
    keep: Annotated[int, FREE] = Field(3, ge=1, description="Number of newest checkpoints to keep.")
    best: Annotated[Literal["loss", "eval"], FREE] = Field(
        "loss",
        description="Weights that `best/` keeps: `loss` those with the lowest held-out loss (`validation.holdout`), "
        "`eval` those with the highest likeness under `eval.drift_limit`, which needs `eval`.",
    )


class PreviewPrompt(Section):
    """A prompt with settings of its own; the keys are named like the options of `infer`."""

    prompt: Annotated[str, FREE] = Field(min_length=1, description="What to draw.", examples=["a photo of sks dog"])
    negative: Annotated[str, FREE] = Field("", description="What to steer away from.")
    size: Annotated[int | str | None, FREE] = Field(
        None,
        description="Side in pixels, or WIDTHxHEIGHT such as `1152x896`; null is `data.resolution`, or the largest of "
        "several.",
    )
    slg: Annotated[float | None, FREE] = Field(
        None, description="Scale of skip-layer guidance; for SD3.5 medium, use 2.8. null turns it off."
    )
    slg_layers: Annotated[list[Annotated[int, Field(ge=0)]], FREE] = Field(
        default=[7, 8, 9], min_length=1, description="The skipped blocks."
    )
    slg_start: Annotated[float, FREE] = Field(
        0.01, ge=0, le=1, description="Where skip-layer guidance starts, as a share of the steps."
    )
    slg_stop: Annotated[float, FREE] = Field(
        0.2, ge=0, le=1, description="Where skip-layer guidance stops, as a share of the steps."
    )

    @field_validator("size")
    @classmethod
    def _multiples_of_16(cls, size: int | str | None) -> int | str | None:
        if size is not None and _sides(size) is None:
            raise ValueError("is no side such as 1024, or WIDTHxHEIGHT such as 1152x896, in multiples of 16")
        return size

    @model_validator(mode="after")
    def _starts_before_it_stops(self) -> PreviewPrompt:
        if self.slg_start >= self.slg_stop:
            raise ValueError(f"slg_start {self.slg_start:g} must be below slg_stop {self.slg_stop:g}")
        return self

    @property
    def sides(self) -> tuple[int, int] | None:
        """(width, height) in pixels; None for the size of the training."""
        return None if self.size is None else _sides(self.size)

    @property
    def recipe(self) -> dict[str, Any]:
        """The entries of a picture's recipe; without settings of its own, the prompt alone."""
        slg = {"scale": self.slg, "layers": self.slg_layers, "start": self.slg_start, "stop": self.slg_stop}
        return {
            "prompt": self.prompt,
            **({"negative": self.negative} if self.negative else {}),
            **({"size": list(self.sides)} if self.sides else {}),
            **({"slg": slg} if self.slg is not None else {}),
        }


def _sides(size: int | str) -> tuple[int, int] | None:
    """Return (width, height); None for anything else, and for sides that are no multiples of 16."""
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", str(size), re.ASCII)
    if found is None:
        return None
    width, height = int(found[1]), int(found[2] or found[1])
    return (width, height) if min(width, height) >= 16 and not (width % 16 or height % 16) else None


class PreviewConfig(Section):
    """Images drawn during training, with the sampler of `infer`."""

    every: Annotated[int, FREE] = Field(
        100, ge=1, description="Steps between previews; also before the first and after the last step."
    )
    prompts: Annotated[list[Annotated[str, Field(min_length=1)] | PreviewPrompt], FREE] = Field(
        default=[],
        description="Prompts, one image each; an empty list draws nothing. An entry may have settings of its own: "
        "`{prompt: a dog, negative: blurry, size: 768x1024, slg: 2.8}`.",
    )
    steps: Annotated[int, Key(Identity.FREE, contract="sampling_steps")] = Field(
        28,
        ge=1,
        le=1000,
        description="Denoising steps per image; stored with the result as the default of `infer`. A base that states "
        "its own, such as `nano`, sets the default.",
    )
    guidance: Annotated[float, Key(Identity.FREE, contract=True)] = Field(
        4.5,
        ge=0,
        description="Classifier-free guidance scale; 1 or less turns it off. Stored with the result as the default of "
        "`infer`. A base that states its own, such as `nano` (2), sets the default.",
    )
    seed: Annotated[int, FREE] = Field(
        0, ge=0, lt=2**63, description="Noise seed of the first prompt; the next prompt uses seed + 1."
    )

    @model_validator(mode="after")
    def _skips_layers_with_guidance(self) -> PreviewConfig:
        if self.guidance <= 1 and any(one.slg is not None for one in self.pictures):
            raise ValueError(f"slg of a prompt needs guidance above 1; it is {self.guidance:g}")
        return self

    @property
    def pictures(self) -> list[PreviewPrompt]:
        """The prompts with their settings."""
        return [PreviewPrompt(prompt=one) if isinstance(one, str) else one for one in self.prompts]

    @property
    def texts(self) -> list[str]:
        """The prompts alone."""
        return [one.prompt for one in self.pictures]


class ValidationConfig(Section):
    """Held-out loss, at fixed noise and sigmas, of the base and of the trained weights.

    `best/` in the run folder keeps the weights with the lowest held-out loss, which may not draw the best images; see
    `checkpoint.best` for another choice.
    """

    holdout: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)], Key(Identity.CONTENT, path=is_any_path)
    ] = Field(
        0,
        description="Number of images to hold out from training (always the same ones), or a folder of other images, "
        "captioned like the first source; 0 turns validation off.",
    )
    every: Annotated[int, FREE] = Field(
        100, ge=1, description="Steps between measurements; also before the first and after the last step."
    )


class EvalConfig(Section):
    """Measurement of drawn pictures during training: likeness to the photos, prompt fidelity, drift.

    Each measurement is a line of `eval.jsonl`, and each measured adapter stays in `eval/measured/`, for `sd3tune eval
    RUN --checkpoints all`. Pictures have the steps, guidance and size of previews.
    """

    every: Annotated[int, FREE] = Field(
        500,
        ge=1,
        description="Steps between measurements; also after the last step. Each draws `seeds` pictures of every prompt "
        "and class prompt; the base's are drawn once.",
    )
    prompts: Annotated[list[Annotated[str, Field(min_length=1)]], FREE] = Field(
        default=[],
        description="Prompts with the subject's name; an empty list takes eight of those that `sd3tune eval` chooses. "
        "Class prompts, for drift, are made of them.",
    )
    seeds: Annotated[int, FREE] = Field(1, ge=1, le=16, description="Pictures of each prompt.")
    class_word: Annotated[Annotated[str, Field(min_length=1)] | None, FREE] = Field(
        None, description="Class of the subject, such as `dog`; null: as a prior's prompt names it, else no drift."
    )
    encoders: Annotated[dict[str, Annotated[str, Field(min_length=1)]], Key(Identity.FREE, path=_is_local)] = Field(
        default={},
        description="Encoder -> Hub id or local folder, such as `{dinov2: ./dinov2-small}`; `none` leaves it out.",
    )
    drift_limit: Annotated[float | None, FREE] = Field(
        None,
        gt=0,
        description="Most drift of the best weights, a share of the way from the base's likeness to the photos' own; "
        "null: as in the verdict of `sd3tune eval`, 0.25.",
    )
    patience: Annotated[int | None, FREE] = Field(
        None,
        ge=1,
        description="End the run after this many measurements without a better one; null never does. A larger number, "
        "or null, continues such a run on `--resume`.",
    )


class WandbConfig(Section):
    """Weights & Biases; needs `pip install 'sd3tune[wandb]'`."""

    project: Annotated[str, FREE] = Field("sd3tune", min_length=1, description="Project of the run.")
    entity: Annotated[str | None, FREE] = Field(None, description="User or team; null uses your default.")
    mode: Annotated[Literal["online", "offline"], FREE] = Field(
        "online",
        description="`online` needs `wandb login` once, and falls back to offline without login or network; `offline` "
        "writes to `logs/wandb`, for upload by `wandb sync`.",
    )
    tags: Annotated[list[Annotated[str, Field(min_length=1)]], FREE] = Field(default=[], description="Tags of the run.")


class TrackingConfig(Section):
    """Trackers that receive curves, previews and the configuration."""

    tensorboard: Annotated[bool, FREE] = Field(
        False,
        description="Write event files to the run's `logs/tensorboard`; needs `pip install 'sd3tune[tensorboard]'`.",
    )
    wandb: Annotated[WandbConfig | None, FREE] = Field(None, description="Weights & Biases; null is off, `{}` is on.")


class HubConfig(Section):
    """Upload of the result to the Hub, with model card, pictures and configuration, without local paths."""

    repo_id: Annotated[str | None, FREE] = Field(
        None,
        description="Repository, as `user/name`; created if it does not exist.",
        json_schema_extra={"pattern": REPO_ID.pattern},
    )
    private: Annotated[bool, FREE] = Field(
        True, description="Make a new repository private; an existing one is not changed."
    )
    description: Annotated[str | None, FREE] = Field(
        None, description="Description at the top of the model card, as Markdown."
    )
    push: Annotated[Literal["end", "checkpoint", "never"], FREE] = Field(
        "never",
        description="`end` uploads after the run; `checkpoint` also uploads each checkpoint's adapter as a separate "
        "commit, in the background; with `never`, upload later with `sd3tune hub push RUN`.",
    )

    @field_validator("repo_id")
    @classmethod
    def _valid_repo_id(cls, repo_id: str | None) -> str | None:
        if repo_id is not None and not REPO_ID.fullmatch(repo_id):
            raise ValueError(f"cannot name a repository; {REPO_ID_IN_WORDS}")
        return repo_id

    @model_validator(mode="after")
    def _push_needs_repo_id(self) -> HubConfig:
        if self.push != "never" and self.repo_id is None:
            raise ValueError(
                f"push is {self.push} but repo_id is null: name the repository, such as user/name, or set "
                "hub.push=never"
            )
        return self

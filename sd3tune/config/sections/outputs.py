"""`checkpoint`, `preview`, `validation`, `tracking` and `hub`: what a run leaves behind."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sd3tune.config.sections.key import FREE, Identity, Key, is_any_path
from sd3tune.config.sections.section import Section

REPO_ID = re.compile(r"^(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?$", re.ASCII)
REPO_ID_IN_WORDS = "write user/name, of letters, digits, '.', '_' and '-', no two '-' or '.' beside each other"


class CheckpointConfig(Section):
    """What a stopped run resumes from."""

    every: Annotated[int, FREE] = Field(
        500, ge=1, description="Steps between checkpoints; the last step is always saved."
    )
    keep: Annotated[int, FREE] = Field(3, ge=1, description="How many of the newest checkpoints are kept.")


class PreviewConfig(Section):
    """Images drawn while training, by the sampler that `infer` uses."""

    every: Annotated[int, FREE] = Field(
        100, ge=1, description="Steps between previews; also before the first and after the last step."
    )
    prompts: Annotated[list[Annotated[str, Field(min_length=1)]], FREE] = Field(
        default=[], description="One image a prompt; an empty list draws nothing."
    )
    steps: Annotated[int, Key(Identity.FREE, contract="sampling_steps")] = Field(
        28, ge=1, le=1000, description="Denoising steps per image; stored with the result, as `infer` draws with them."
    )
    guidance: Annotated[float, Key(Identity.FREE, contract=True)] = Field(
        4.5,
        ge=0,
        description="Classifier-free guidance scale; 1 or less turns it off. Stored with the result, as `infer` draws "
        "with it.",
    )
    seed: Annotated[int, FREE] = Field(
        0, ge=0, lt=2**63, description="Seed of the first prompt's noise; the next has seed + 1."
    )


class ValidationConfig(Section):
    """The loss on images that are not trained on, at fixed noise and sigmas, of the base and as trained.

    `best/` in the run folder keeps the weights with the lowest held-out loss, which need not be those that draw best.
    """

    holdout: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)], Key(Identity.CONTENT, path=is_any_path)
    ] = Field(
        0,
        description="How many of the images to keep from training (always the same ones), or a folder of others, "
        "captioned like the first source; 0 measures nothing.",
    )
    every: Annotated[int, FREE] = Field(
        100, ge=1, description="Steps between measurements; also before the first and after the last step."
    )


class WandbConfig(Section):
    """Weights & Biases; needs `pip install 'sd3tune[wandb]'`."""

    project: Annotated[str, FREE] = Field("sd3tune", min_length=1, description="The project that the run appears in.")
    entity: Annotated[str | None, FREE] = Field(None, description="User or team; null takes your default one.")
    mode: Annotated[Literal["online", "offline"], FREE] = Field(
        "online",
        description="`online` needs `wandb login` once, and goes on offline where that or the network is lacking; "
        "`offline` keeps everything in `logs/wandb`, to be uploaded by `wandb sync`.",
    )
    tags: Annotated[list[Annotated[str, Field(min_length=1)]], FREE] = Field(default=[], description="Tags of the run.")


class TrackingConfig(Section):
    """Where curves, previews and the configuration go besides the run folder."""

    tensorboard: Annotated[bool, FREE] = Field(
        False, description="Event files in the run's `logs/tensorboard`; needs `pip install 'sd3tune[tensorboard]'`."
    )
    wandb: Annotated[WandbConfig | None, FREE] = Field(None, description="Weights & Biases; null is off, `{}` is on.")


class HubConfig(Section):
    """Upload of what was trained to the Hub, with its card, pictures and configuration; without any path."""

    repo_id: Annotated[str | None, FREE] = Field(
        None,
        description="The repository, as `user/name`; made when there is none.",
        json_schema_extra={"pattern": REPO_ID.pattern},
    )
    private: Annotated[bool, FREE] = Field(
        True, description="Whether a repository that is made is private; one that is there stays so."
    )
    description: Annotated[str | None, FREE] = Field(
        None, description="Your own words, as Markdown, at the top of the model card: what it is and what it is for."
    )
    push: Annotated[Literal["end", "checkpoint", "never"], FREE] = Field(
        "never",
        description="`end` uploads when the run has ended, `checkpoint` also each checkpoint's adapter, as a commit of "
        "its own, beside the training; with `never`, `sd3tune hub push RUN` does it later.",
    )

    @field_validator("repo_id")
    @classmethod
    def _of_someone(cls, repo_id: str | None) -> str | None:
        if repo_id is not None and not REPO_ID.fullmatch(repo_id):
            raise ValueError(f"cannot name a repository; {REPO_ID_IN_WORDS}")
        return repo_id

    @model_validator(mode="after")
    def _has_somewhere_to_go(self) -> HubConfig:
        if self.push != "never" and self.repo_id is None:
            raise ValueError(
                f"push is {self.push} and repo_id is null: name the repository, such as user/name, or set "
                "hub.push=never"
            )
        return self

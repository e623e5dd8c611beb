"""`checkpoint`, `preview`, `validation`, `tracking` and `hub`: what a run leaves behind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sd3tune.config.sections.section import Section


class CheckpointConfig(Section):
    """What a stopped run resumes from."""

    every: int = Field(500, ge=1, description="Steps between checkpoints; the last step is always saved.")
    keep: int = Field(3, ge=1, description="How many of the newest checkpoints are kept.")


class PreviewConfig(Section):
    """Images drawn while training, by the sampler that `infer` uses."""

    every: int = Field(100, ge=1, description="Steps between previews; also before the first and after the last step.")
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="One image a prompt; an empty list draws nothing."
    )
    steps: int = Field(28, ge=1, le=1000, description="Denoising steps per image.")
    guidance: float = Field(7.0, ge=0, description="Classifier-free guidance scale; 1 or less turns it off.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the first prompt's noise; the next has seed + 1.")


class ValidationConfig(Section):
    """The loss on images that are not trained on, at fixed noise and sigmas, of the base and as trained."""

    holdout: Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)] = Field(
        0,
        description="How many of the images to keep from training (always the same ones), or a folder of others, "
        "captioned like the first source; 0 measures nothing.",
    )
    every: int = Field(
        100, ge=1, description="Steps between measurements; also before the first and after the last step."
    )


class WandbConfig(Section):
    """Weights & Biases; needs `pip install 'sd3tune[wandb]'`."""

    project: str = Field("sd3tune", min_length=1, description="The project that the run appears in.")
    entity: str | None = Field(None, description="User or team; null takes your default one.")
    mode: Literal["online", "offline"] = Field(
        "online",
        description="`online` needs `wandb login` once, and goes on offline where that or the network is lacking; "
        "`offline` keeps everything in `logs/wandb`, to be uploaded by `wandb sync`.",
    )
    tags: list[Annotated[str, Field(min_length=1)]] = Field(default=[], description="Tags of the run.")


class TrackingConfig(Section):
    """Where curves, previews and the configuration go besides the run folder."""

    tensorboard: bool = Field(
        False, description="Event files in the run's `logs/tensorboard`; needs `pip install 'sd3tune[tensorboard]'`."
    )
    wandb: WandbConfig | None = Field(None, description="Weights & Biases; null is off, `{}` is on.")


class HubConfig(Section):
    """Upload of what was trained."""

    repo_id: None = Field(None, description="Target repository; not available yet, keep null.")
    private: bool = Field(True, description="Whether a created repository is private.")
    push: Literal["never"] = Field("never", description="When to upload: only never so far.")

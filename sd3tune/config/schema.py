"""The whole configuration as strict, frozen models. One sentence a field: effect, unit, cost.

Its sections, in `sections/`, are the single source of the defaults, of the JSON Schema and of the config reference. A
variant (method, timesteps, weighting, optimizer, schedule, source) is one model in a union that `kind` discriminates;
`variants` adds those from outside. Each key declares what it means for a run: see `sections.key`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, field_validator, model_validator

from sd3tune.config.sections.data import DataConfig
from sd3tune.config.sections.flow import FlowConfig
from sd3tune.config.sections.key import FREE, TRAINING, Identity, Key, is_any_path
from sd3tune.config.sections.method import LoraConfig, MethodConfig
from sd3tune.config.sections.model import ModelConfig
from sd3tune.config.sections.optimizer import AdamWConfig, ConstantConfig, OptimizerConfig, ScheduleConfig
from sd3tune.config.sections.outputs import CheckpointConfig, HubConfig, PreviewConfig, TrackingConfig, ValidationConfig
from sd3tune.config.sections.section import Section
from sd3tune.config.sections.train import EmaConfig, TrainConfig

CONFIG_VERSION = 1

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


Values = Section | Mapping[str, Any]
"""A section as code gives it: its keys and values, or that of another configuration."""


class CheckedLikeAFile(type(BaseModel)):  # type: ignore[misc]
    """The class of `Config`: a call checks its arguments like a file. pydantic builds a Config without this call."""

    check: Callable[[Mapping[str, Any]], Any]
    """The check, which `loader` sets, as it stands above the schema."""

    if not TYPE_CHECKING:

        def __call__(cls, **sections: Any) -> Any:
            return CheckedLikeAFile.check(sections)


class Config(Section, metaclass=CheckedLikeAFile):
    """A run of sd3tune, checked and unchangeable.

    Built in code, it takes the keys and values of a YAML file; paths are relative to the working directory. Raises
    ConfigError, one line per problem.
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            data: Values,
            config_version: int = ...,
            name: str = ...,
            seed: int = ...,
            output_dir: str | os.PathLike[str] | None = ...,
            model: Values = ...,
            method: Values = ...,
            flow: Values = ...,
            optimizer: Values = ...,
            schedule: Values = ...,
            train: Values = ...,
            ema: Values | None = ...,
            checkpoint: Values = ...,
            preview: Values = ...,
            validation: Values = ...,
            tracking: Values = ...,
            hub: Values = ...,
        ) -> None: ...

    config_version: Annotated[int, FREE] = Field(
        CONFIG_VERSION, ge=1, le=CONFIG_VERSION, description="Version of this format; a newer one is refused."
    )
    name: Annotated[str, Key(Identity.FREE, contract=True)] = Field(
        "my-lora",
        max_length=100,
        description="Name of the run and of its folder: letters, digits, `.`, `_` and `-`.",
        json_schema_extra={"pattern": _NAME.pattern},
    )
    seed: Annotated[int, Key(Identity.WRITTEN, contract=True)] = Field(
        0, ge=0, lt=2**63, description="Order, crops, sigmas, noise and initial weights follow from it."
    )
    output_dir: Annotated[str | None, Key(Identity.FREE, path=is_any_path)] = Field(
        None,
        description="The run folder, relative to the YAML file; null: `runs/{name}` where sd3tune starts.",
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="The base model.")
    method: MethodConfig = Field(default_factory=LoraConfig, description="What is trained.")
    data: DataConfig = Field(
        examples=["{sources: [{path: ./photos, caption: a photo of sks dog}]}"],
        description="What it is trained on.",
    )
    flow: FlowConfig = Field(default_factory=FlowConfig, description="The objective.")
    optimizer: OptimizerConfig = Field(default_factory=AdamWConfig, description="How weights are updated.")
    schedule: ScheduleConfig = Field(default_factory=ConstantConfig, description="Learning rate over time.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="Length, batch and memory.")
    ema: Annotated[EmaConfig | None, Key(Identity.WRITTEN, phases=TRAINING)] = Field(
        None, description="Average the trained weights; null turns it off."
    )
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="What a run resumes from.")
    preview: PreviewConfig = Field(default_factory=PreviewConfig, description="Images while training.")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="Held-out loss.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Experiment trackers.")
    hub: HubConfig = Field(default_factory=HubConfig, description="Upload.")

    @field_validator("name")
    @classmethod
    def _a_folder_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("cannot name a folder; use letters, digits, '.', '_' and '-', a letter or digit first")
        return name

    @model_validator(mode="after")
    def _one_length(self) -> Config:
        steps, epochs = self.train.steps, self.train.epochs
        if steps is not None and epochs is not None:
            raise ValueError(
                f"train.steps is {steps} and train.epochs is {epochs:g}: both say how long to train; leave one out, "
                "or set it to null"
            )
        if steps is None and epochs is None:
            raise ValueError("train.steps and train.epochs are both null; give one of them a number")
        return self

    @model_validator(mode="after")
    def _new_weights_are_trained_whole(self) -> Config:
        if self.model.init == "pretrained":
            return self
        if self.method.freezes_base:
            raise ValueError(
                f"model.init is random and method.kind is {self.method.kind}: there is nothing to adapt yet; set "
                "method.kind=full to train from scratch, or model.init=pretrained"
            )
        for number, source in enumerate(self.data.sources):
            if source.prior is not None:
                raise ValueError(
                    f"data.sources.{number}.prior keeps what the base knows, and with model.init=random it knows "
                    "nothing; leave the prior out"
                )
        return self

    @model_validator(mode="after")
    def _what_is_trained_is_held_in_full(self) -> Config:
        if self.model.quantize != "none" and not self.method.freezes_base:
            raise ValueError(
                f"model.quantize is {self.model.quantize} and method.kind is {self.method.kind}: only a frozen base "
                "can be quantised; set model.quantize=none, or method.kind=lora"
            )
        return self

    @model_validator(mode="after")
    def _tags_go_into_an_adapter(self) -> Config:
        if self.data.export_tags and not self.method.makes_adapter:
            raise ValueError(
                f"data.export_tags is true and method.kind is {self.method.kind}: only an adapter's file has a place "
                "for tags; leave data.export_tags out"
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Config:
        if self.train.steps is not None and not self.warmup_fits(self.train.steps):
            raise ValueError(
                f"schedule.warmup_steps is {self.schedule.warmup_steps} but train.steps is "
                f"{self.train.steps}: the learning rate would never reach its peak; warm up for fewer steps"
            )
        return self

    def warmup_fits(self, steps: int) -> bool:
        """Whether a run of that many steps reaches its peak learning rate."""
        return self.schedule.warmup_steps < steps

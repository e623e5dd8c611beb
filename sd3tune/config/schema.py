"""The whole configuration as strict, frozen models. Each field has one sentence: effect, unit, cost.

The sections, in `sections/`, are the single source of defaults, JSON Schema and config reference. A variant (method,
timesteps, weighting, optimizer, schedule, source) is one model in a union discriminated by `kind`; `variants` adds
variants from outside. Each key declares its meaning for a run: see `sections.key`.
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
from sd3tune.config.sections.optimizer import AdamWConfig, OptimizerConfig
from sd3tune.config.sections.outputs import (
    CheckpointConfig,
    EvalConfig,
    HubConfig,
    PreviewConfig,
    TrackingConfig,
    ValidationConfig,
)
from sd3tune.config.sections.schedule import ConstantConfig, ScheduleConfig
from sd3tune.config.sections.section import Section
from sd3tune.config.sections.train import EmaConfig, TrainConfig
from sd3tune.config.sharding import sharding_problem

CONFIG_VERSION = 1

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


Values = Section | Mapping[str, Any]
"""A section given in code: its keys and values, or the section of another configuration."""


class ConfigType(type(BaseModel)):  # type: ignore[misc]
    """Metaclass of `Config`: a call checks its arguments like a file. pydantic builds a Config without this call."""

    check: Callable[[Mapping[str, Any]], Any]
    """The check; `loader` sets it, as it imports the schema and not vice versa."""

    if not TYPE_CHECKING:

        def __call__(cls, **sections: Any) -> Any:
            return ConfigType.check(sections)


class Config(Section, metaclass=ConfigType):
    """The configuration of a run, checked and immutable.

    In code, it takes the keys and values of a YAML file; paths are relative to the working directory. Raises
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
            eval: Values | None = ...,
            tracking: Values = ...,
            hub: Values = ...,
        ) -> None: ...

    config_version: Annotated[int, FREE] = Field(
        CONFIG_VERSION, ge=1, le=CONFIG_VERSION, description="Version of this format; newer versions are refused."
    )
    name: Annotated[str, Key(Identity.FREE, contract=True)] = Field(
        "my-lora",
        max_length=100,
        description="Name of the run and of its folder: letters, digits, `.`, `_` and `-`.",
        json_schema_extra={"pattern": _NAME.pattern},
    )
    seed: Annotated[int, Key(Identity.WRITTEN, contract=True)] = Field(
        0, ge=0, lt=2**63, description="Seed of order, crops, sigmas, noise and initial weights."
    )
    output_dir: Annotated[str | None, Key(Identity.FREE, path=is_any_path)] = Field(
        None,
        description="The run folder, relative to the YAML file; null: `runs/{name}` in the working directory.",
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="The base model.")
    method: MethodConfig = Field(default_factory=LoraConfig, description="The training method.")
    data: DataConfig = Field(
        examples=["{sources: [{path: ./photos, caption: a photo of sks dog}]}"],
        description="The training data.",
    )
    flow: FlowConfig = Field(default_factory=FlowConfig, description="The objective.")
    optimizer: OptimizerConfig = Field(default_factory=AdamWConfig, description="How weights are updated.")
    schedule: ScheduleConfig = Field(default_factory=ConstantConfig, description="Learning rate over time.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="Length, batch and memory.")
    ema: Annotated[EmaConfig | None, Key(Identity.WRITTEN, phases=TRAINING)] = Field(
        None, description="Average the trained weights; null turns it off."
    )
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Checkpoints to resume from.")
    preview: PreviewConfig = Field(default_factory=PreviewConfig, description="Images drawn during training.")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="Held-out loss.")
    eval: Annotated[EvalConfig | None, FREE] = Field(
        None, description="Measurement of pictures during training; null is off, `{}` is on."
    )
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Experiment trackers.")
    hub: HubConfig = Field(default_factory=HubConfig, description="Upload to the Hub.")

    @field_validator("name")
    @classmethod
    def _valid_folder_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("cannot name a folder; use letters, digits, '.', '_' and '-', a letter or digit first")
        return name

    @model_validator(mode="after")
    def _exactly_one_length(self) -> Config:
        steps, epochs = self.train.steps, self.train.epochs
        if steps is not None and epochs is not None:
            raise ValueError(
                f"train.steps is {steps} and train.epochs is {epochs:g}: both set the length of training; remove one, "
                "or set it to null"
            )
        if steps is None and epochs is None:
            raise ValueError("train.steps and train.epochs are both null; give one of them a number")
        return self

    @model_validator(mode="after")
    def _random_init_needs_full_training(self) -> Config:
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
                    f"data.sources.{number}.prior preserves the base's knowledge, but with model.init=random it "
                    "has none; remove the prior"
                )
            if source.outside_target == "base":
                raise ValueError(
                    f"data.sources.{number}.outside_target is base, but with model.init=random the base predicts "
                    "nothing yet; leave outside_target out"
                )
        return self

    @model_validator(mode="after")
    def _quantized_base_is_frozen(self) -> Config:
        if self.model.quantize != "none" and not self.method.freezes_base:
            raise ValueError(
                f"model.quantize is {self.model.quantize} and method.kind is {self.method.kind}: only a frozen base "
                "can be quantised; set model.quantize=none, or method.kind=lora"
            )
        return self

    @model_validator(mode="after")
    def _packed_base_fits_the_method(self) -> Config:
        if self.model.quantize == "nf4" and not self.method.fits_packed_base:
            raise ValueError(
                f"model.quantize is nf4 and method.kind is {self.method.kind}: PEFT computes it only where the base's "
                "weights have rows; set model.quantize=int8 or none, or method.kind=lora or dora"
            )
        return self

    @model_validator(mode="after")
    def _blocks_can_be_compiled(self) -> Config:
        if self.train.compile == "none":
            return self
        if self.model.quantize != "none":
            raise ValueError(
                f"train.compile is {self.train.compile} and model.quantize is {self.model.quantize}: quantised layers "
                "are not compiled; set one of them to none"
            )
        if self.method.draws_in_blocks:
            raise ValueError(
                f"train.compile is {self.train.compile} and method.dropout is not 0: its random masks are not "
                "compiled; set train.compile=none or method.dropout=0"
            )
        return self

    @model_validator(mode="after")
    def _swapped_blocks_are_frozen(self) -> Config:
        if self.train.swap_blocks is not None and not self.method.freezes_base:
            raise ValueError(
                f"train.swap_blocks is {self.train.swap_blocks} and method.kind is {self.method.kind}: only the blocks "
                "of a frozen base can wait in system memory; leave train.swap_blocks out, or set method.kind=lora"
            )
        if self.train.swap_blocks is not None and self.method.reads_base:
            raise ValueError(
                f"train.swap_blocks is {self.train.swap_blocks} and method.kind is {self.method.kind}: it needs all "
                "weights' norms, and swapped ones wait in system memory; leave train.swap_blocks out, or set "
                "method.kind=lora"
            )
        return self

    @model_validator(mode="after")
    def _rest_fits_sharding(self) -> Config:
        problem = sharding_problem(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _fused_backward_updates_in_slices(self) -> Config:
        if self.train.fused_backward and not self.optimizer.updates_in_slices:
            raise ValueError(
                f"train.fused_backward is true and optimizer.kind is {self.optimizer.kind}, which needs the whole "
                "gradient; set optimizer.kind=adamw or adamw8bit, or leave train.fused_backward out"
            )
        if self.train.fused_backward and self.method.has_rates:
            raise ValueError(
                f"train.fused_backward is true, and {self.method.gives_rates} learning rates of their own, which "
                "scale whole updates; leave one of them out"
            )
        if self.train.fused_backward and self.method.trains_text:
            raise ValueError(
                f"train.fused_backward is true and method.kind is {self.method.kind}, which trains only a few vectors; "
                "leave train.fused_backward out"
            )
        return self

    @model_validator(mode="after")
    def _averages_follow_one_rate(self) -> Config:
        if self.optimizer.replaces_schedule and self.method.has_rates:
            raise ValueError(
                f"optimizer.kind is {self.optimizer.kind}, whose averages follow one learning rate, and "
                f"{self.method.gives_rates} rates of their own; take another optimizer, or leave these keys out"
            )
        return self

    @model_validator(mode="after")
    def _exported_tags_need_adapter(self) -> Config:
        if self.data.export_tags and not self.method.makes_adapter:
            raise ValueError(
                f"data.export_tags is true and method.kind is {self.method.kind}: only an adapter's file has a place "
                "for tags; leave data.export_tags out"
            )
        return self

    @model_validator(mode="after")
    def _best_by_evaluation_needs_eval(self) -> Config:
        if self.checkpoint.best == "eval" and self.eval is None:
            raise ValueError(
                "checkpoint.best is eval but eval is null: measure during training, such as with eval={every: 200}, or "
                "set checkpoint.best=loss"
            )
        return self

    @property
    def patience(self) -> int | None:
        """`eval.patience`; None also if `eval` is off."""
        return None if self.eval is None else self.eval.patience

    @model_validator(mode="after")
    def _one_schedule(self) -> Config:
        if self.optimizer.replaces_schedule and self.schedule.depends_on_length:
            raise ValueError(
                f"optimizer.kind is {self.optimizer.kind}, which averages weights instead of lowering the learning "
                f"rate, and schedule.kind is {self.schedule.kind}; set schedule.kind=constant (a warm-up is fine)"
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
        """Return True if a run of that many steps reaches its peak learning rate."""
        return self.schedule.warmup_steps < steps

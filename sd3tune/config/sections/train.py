"""`train` and `ema`: length, batch and memory of the training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sd3tune.config.sections.key import FREE, RESOLVED, TRAINING, WRITTEN, Identity, Key, Knob
from sd3tune.config.sections.section import Section


class TrainConfig(Section):
    """Length, batch and memory of the training."""

    steps: Annotated[int | None, RESOLVED] = Field(
        1000, ge=1, description="Optimizer steps; null, or left out, when `epochs` is given."
    )
    epochs: Annotated[float | None, WRITTEN] = Field(
        None,
        gt=0,
        description="The length in passes over the data, repeats counted, instead of `steps`; rounded up to a step.",
    )
    batch_size: Annotated[int, Key(Identity.WRITTEN, phases=TRAINING, knob=Knob(("train",)))] = Field(
        1, ge=1, description="Images per process and forward pass."
    )
    gradient_accumulation: Annotated[int, Key(Identity.WRITTEN, phases=TRAINING, knob=Knob(("train",)))] = Field(
        1, ge=1, description="Forward passes per optimizer step; multiplies the batch at no memory."
    )
    max_grad_norm: Annotated[float | None, WRITTEN] = Field(
        1.0, gt=0, description="Gradients are scaled down to this norm; null leaves them."
    )
    gradient_checkpointing: Annotated[
        Literal["none", "block", "selective"],
        Key(Identity.FREE, phases=TRAINING, knob=Knob(("train",), ("selective", "block"))),
    ] = Field(
        "none",
        description="`block` recomputes each transformer block in the backward pass: a tenth of the "
        "activations for a third more time. `selective` keeps what attention made: a little more memory, less time.",
    )
    checkpointed_blocks: Annotated[int | None, Key(Identity.FREE, phases=TRAINING, knob=Knob(("train",)))] = Field(
        None, ge=1, description="How many blocks are recomputed, from the first on; null is all of them."
    )
    memory: Annotated[Annotated[float, Field(gt=0)] | Literal["auto"] | None, FREE] = Field(
        None,
        description="GB (10^9 bytes) that the run may take; `auto` is what is free on the card. What makes it fit is "
        "chosen as `sd3tune plan` forecasts it: T5 on the CPU, checkpointing, a base in 4 bits, how many of a step's "
        "images (`batch_size` times `gradient_accumulation`) go together. null leaves all as it is.",
    )
    fast_path: Annotated[bool, FREE] = Field(
        True,
        description="Compute each transformer block with fewer passes over memory: equal to diffusers' and PEFT's own "
        "way but for rounding, no less exact, and faster. Previews, reports and `infer` never use it.",
    )
    hoist: Annotated[bool, FREE] = Field(
        True,
        description="Keep the layers of timestep and pooled text alone (adaLN, a third of the base) off the "
        "device and compute them for many steps at once, and keep of the position grid what a picture needs: equal "
        "but for rounding. Does nothing where those layers are trained.",
    )
    max_skipped: Annotated[int, FREE] = Field(
        20,
        ge=1,
        description="A step whose gradient is not finite is skipped; after this many in a row the run saves and stops.",
    )
    log_every: Annotated[int, FREE] = Field(
        10, ge=1, description="Steps between refreshes of the progress line and metrics file."
    )

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_the_default(cls, values: Any) -> Any:
        given = isinstance(values, dict) and values.get("epochs") is not None
        return {**values, "steps": values.get("steps")} if given else values

    @model_validator(mode="after")
    def _checkpointed_how(self) -> TrainConfig:
        if self.checkpointed_blocks is not None and self.gradient_checkpointing == "none":
            raise ValueError(
                f"checkpointed_blocks is {self.checkpointed_blocks} and gradient_checkpointing is none; "
                "set gradient_checkpointing: block or selective, or leave checkpointed_blocks out"
            )
        return self

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps. Known only once `epochs` was resolved against the data."""
        if self.steps is None:
            raise ValueError("train.epochs has not been resolved into steps")
        return self.steps


class EmaConfig(Section):
    """An exponential moving average of the trained weights, in fp32."""

    decay: Annotated[float, Key(Identity.WRITTEN, phases=TRAINING)] = Field(
        0.99,
        ge=0,
        lt=1,
        description="Decay per step, warmed up as min(decay, (1+t)/(10+t)): 0.99 is reached at step 890.",
    )

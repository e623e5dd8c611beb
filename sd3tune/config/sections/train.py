"""`train` and `ema`: length, batch and memory of the training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sd3tune.config.sections.key import FREE, RESOLVED, TRAINING, WRITTEN, Identity, Key, Knob
from sd3tune.config.sections.section import Section


class TrainConfig(Section):
    """Length, batch and memory of the training."""

    steps: Annotated[int | None, RESOLVED] = Field(
        1000, ge=1, description="Number of optimizer steps; null or left out if `epochs` is given."
    )
    epochs: Annotated[float | None, WRITTEN] = Field(
        None,
        gt=0,
        description="Length in passes over the data, repeats included, instead of `steps`; rounded up to whole steps.",
    )
    batch_size: Annotated[int, Key(Identity.WRITTEN, phases=TRAINING, knob=Knob(("train",)))] = Field(
        1, ge=1, description="Images per process and forward pass."
    )
    gradient_accumulation: Annotated[int, Key(Identity.WRITTEN, phases=TRAINING, knob=Knob(("train",)))] = Field(
        1, ge=1, description="Forward passes per optimizer step; multiplies the batch size without more memory."
    )
    max_grad_norm: Annotated[float | None, WRITTEN] = Field(
        1.0, gt=0, description="Maximum gradient norm, to which gradients are clipped; null turns clipping off."
    )
    gradient_checkpointing: Annotated[
        Literal["none", "block", "selective"],
        Key(Identity.FREE, phases=TRAINING, knob=Knob(("train",), ("selective", "block"))),
    ] = Field(
        "none",
        description="`block` recomputes each transformer block in the backward pass: a tenth of the activation memory "
        "for a third more time. `selective` keeps attention outputs: slightly more memory, less time.",
    )
    checkpointed_blocks: Annotated[int | None, Key(Identity.FREE, phases=TRAINING, knob=Knob(("train",)))] = Field(
        None, ge=1, description="Number of blocks to recompute, from the first on; null recomputes all."
    )
    swap_blocks: Annotated[int | None, Key(Identity.FREE, knob=Knob(("load", "train")))] = Field(
        None,
        ge=3,
        description="Number of transformer blocks whose weights stay in system memory; they are copied to the GPU "
        "ahead of their use, in forward and backward pass. Two of them are there at a time. Needs a frozen base.",
    )
    fused_backward: Annotated[bool, Key(Identity.FREE, phases=TRAINING)] = Field(
        False,
        description="Update weights inside the backward pass, so that no gradient of the whole model is kept: 6 bytes "
        "less for each trained parameter in 16 bits. Equal results. Needs `max_grad_norm: null`, "
        "`gradient_accumulation: 1`, and AdamW. A gradient that is not finite cannot be skipped, and ends the run.",
    )
    memory: Annotated[Annotated[float, Field(gt=0)] | Literal["auto"] | None, FREE] = Field(
        None,
        description="Memory budget of the run in GB (10^9 bytes); `auto` is the free memory of the GPU. Settings that "
        "fit are chosen with the forecast of `sd3tune plan`: T5 on the CPU, checkpointing, swapped blocks, a 4-bit "
        "base, and the split of a step's images into `batch_size` and `gradient_accumulation`. null changes no "
        "settings.",
    )
    sharding: Annotated[Literal["none", "fsdp", "zero2", "zero3"], Key(Identity.FREE, phases=TRAINING)] = Field(
        "none",
        description="`fsdp` divides the transformer's blocks among the processes of a run (FSDP2), which gather one "
        "block at a time. With `method.kind: full`, master, optimizer state and checkpoints are divided, too. `zero2` "
        "and `zero3` need DeepSpeed, and are refused: `fsdp` divides as much. No effect with one process.",
    )
    fast_path: Annotated[bool, FREE] = Field(
        True,
        description="Compute each transformer block with fewer passes over memory: faster, equal to diffusers and PEFT "
        "up to rounding, and equally precise. Previews, reports and `infer` never use it.",
    )
    compile: Annotated[Literal["none", "blocks"], FREE] = Field(
        "none",
        description="`blocks` lets torch compile the transformer blocks for training, in place of the fast path: fewer "
        "kernels, equal up to rounding. The first step of each image size takes a minute or more. It needs a C++ "
        "compiler, or Triton on a GPU, an unquantised base, `method.dropout: 0` and no selective checkpointing.",
    )
    hoist: Annotated[bool, FREE] = Field(
        True,
        description="Keep layers that depend only on timestep and pooled text (adaLN, a third of the base) off the "
        "device and compute them for many steps at once; keep only the needed part of the position grid. Equal up to "
        "rounding. No effect if those layers or text encoders are trained.",
    )
    max_skipped: Annotated[int, FREE] = Field(
        20,
        ge=1,
        description="Steps with non-finite gradients are skipped; after this many in a row the run saves and stops.",
    )
    log_every: Annotated[int, FREE] = Field(
        10, ge=1, description="Steps between updates of the progress line and metrics file."
    )

    process_timeout: Annotated[float, FREE] = Field(
        120.0,
        gt=0,
        description="Minutes that the processes of a run wait for each other. One process saves, draws previews and "
        "uploads while the others wait, so this must be longer than the longest of these.",
    )

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_the_default(cls, values: Any) -> Any:
        given = isinstance(values, dict) and values.get("epochs") is not None
        return {**values, "steps": values.get("steps")} if given else values

    @model_validator(mode="after")
    def _checkpointed_blocks_need_checkpointing(self) -> TrainConfig:
        if self.checkpointed_blocks is not None and self.gradient_checkpointing == "none":
            raise ValueError(
                f"checkpointed_blocks is {self.checkpointed_blocks} but gradient_checkpointing is none; "
                "set gradient_checkpointing: block or selective, or leave checkpointed_blocks out"
            )
        return self

    @model_validator(mode="after")
    def _kept_attention_is_not_compiled(self) -> TrainConfig:
        if self.compile != "none" and self.gradient_checkpointing == "selective":
            raise ValueError(
                f"compile is {self.compile} and gradient_checkpointing is selective: attention cannot be kept out of "
                "a compiled block; set gradient_checkpointing: block, or compile: none"
            )
        return self

    @model_validator(mode="after")
    def _fused_backward_needs_no_whole_gradient(self) -> TrainConfig:
        if self.fused_backward and (self.max_grad_norm is not None or self.gradient_accumulation > 1):
            norm = "null" if self.max_grad_norm is None else f"{self.max_grad_norm:g}"
            raise ValueError(
                f"fused_backward is true, but max_grad_norm is {norm} and gradient_accumulation is "
                f"{self.gradient_accumulation}; set max_grad_norm: null and gradient_accumulation: 1, as others need "
                "the whole gradient, or leave fused_backward out"
            )
        return self

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps. Raises ValueError until `epochs` is resolved against the data."""
        if self.steps is None:
            raise ValueError("train.epochs has not been resolved into steps")
        return self.steps


class EmaConfig(Section):
    """Exponential moving average of the trained weights, in fp32."""

    decay: Annotated[float, Key(Identity.WRITTEN, phases=TRAINING)] = Field(
        0.99,
        ge=0,
        lt=1,
        description="Decay per step, warmed up as min(decay, (1+t)/(10+t)): 0.99 is reached at step 890.",
    )

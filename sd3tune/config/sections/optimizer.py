"""`optimizer` and `schedule`: weight updates and learning rate."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sd3tune.config.sections.key import TRAINING, Identity, Key, Knob
from sd3tune.config.sections.section import Section

_TRAINING = Key(Identity.WRITTEN, phases=TRAINING)


class OptimizerSection(Section):
    """Fields shared by all optimizers."""

    updates_in_slices: ClassVar[bool] = False
    """True if it updates each weight apart, so that a step can be taken slice by slice: see `optimizers.Sliced`."""
    kind: str
    lr: Annotated[float, _TRAINING] = Field(1e-4, gt=0, description="Peak learning rate.")


class _Adam(OptimizerSection):
    """Fields shared by Adam and its variants."""

    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], _TRAINING] = Field(
        default=[0.9, 0.999], min_length=2, max_length=2, description="Decay rates of the two moments."
    )
    eps: Annotated[float, _TRAINING] = Field(1e-8, gt=0, description="Constant added to the denominator.")
    weight_decay: Annotated[float, _TRAINING] = Field(
        1e-4, ge=0, description="Decoupled weight decay, multiplied by the learning rate."
    )


class AdamWConfig(_Adam):
    """AdamW (Loshchilov & Hutter 2019), fused."""

    updates_in_slices = True
    kind: Annotated[Literal["adamw"], Key(Identity.WRITTEN, phases=TRAINING, knob=Knob(("train",), ("adamw8bit",)))] = (
        Field("adamw", description="Fused AdamW on one flat fp32 master tensor.")
    )


class AdamW8bitConfig(_Adam):
    """AdamW with 8-bit moments in blocks of 256 (Dettmers et al. 2022). Needs `sd3tune[bitsandbytes]`."""

    updates_in_slices = True
    kind: Annotated[Literal["adamw8bit"], _TRAINING] = Field(
        "adamw8bit", description="Saves 6 bytes per trained parameter: 60 to 140 MB for a LoRA of rank 16."
    )


class ProdigyConfig(_Adam):
    """Prodigy (Mishchenko & Defazio 2024): AdamW that estimates its learning rate, d, during training."""

    kind: Annotated[Literal["prodigy"], _TRAINING] = Field(
        "prodigy", description="Needs no learning rate; takes twice AdamW's memory."
    )
    lr: Annotated[float, _TRAINING] = Field(
        1.0, gt=0, description="Multiplies the estimated rate, as the schedule does; leave it at 1."
    )
    d0: Annotated[float, _TRAINING] = Field(
        1e-6, gt=0, description="Initial estimate, which only grows, so it must be below any suitable rate."
    )
    d_coef: Annotated[float, _TRAINING] = Field(
        1.0, gt=0, description="Multiplies each new estimate: 0.5 gives a lower rate, 2 a higher rate."
    )
    safeguard_warmup: Annotated[bool, _TRAINING] = Field(
        True, description="Keep a schedule's warm-up from inflating the estimate."
    )
    use_bias_correction: Annotated[bool, _TRAINING] = Field(
        True, description="Use Adam's bias correction, which makes Prodigy start slower."
    )


OptimizerConfig = Annotated[AdamWConfig | AdamW8bitConfig | ProdigyConfig, Field(discriminator="kind")]

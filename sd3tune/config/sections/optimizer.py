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
    updates_in_shards: ClassVar[bool] = False
    """True if each weight's update and state depend on that weight alone, so that processes can divide them."""
    moments: ClassVar[bool] = True
    """True if it keeps two fp32 values per weight or more, which `adamw8bit` would reduce to 2 bytes."""
    replaces_schedule: ClassVar[bool] = False
    """True if it averages weights instead of lowering the learning rate, which must then be constant."""
    kind: str
    lr: Annotated[float, _TRAINING] = Field(
        1e-4, gt=0, description="Peak learning rate. With `method.kind: textual_inversion` the default is 5e-3."
    )


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
    updates_in_shards = True
    kind: Annotated[Literal["adamw"], Key(Identity.WRITTEN, phases=TRAINING, knob=Knob(("train",), ("adamw8bit",)))] = (
        Field("adamw", description="Fused AdamW on one flat fp32 master tensor.")
    )


class AdamW8bitConfig(_Adam):
    """AdamW with 8-bit moments in blocks of 256 (Dettmers et al. 2022). Needs `sd3tune[bitsandbytes]`."""

    updates_in_slices = True
    moments = False
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


class LionConfig(OptimizerSection):
    """Lion (Chen et al. 2023): the sign of a momentum, so that every weight moves by the learning rate."""

    updates_in_slices = True
    updates_in_shards = True
    moments = False
    kind: Annotated[Literal["lion"], _TRAINING] = Field(
        "lion", description="Half of AdamW's state: 4 bytes per trained parameter."
    )
    lr: Annotated[float, _TRAINING] = Field(
        3e-5, gt=0, description="Peak learning rate: a third to a tenth of AdamW's, as updates do not shrink."
    )
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], _TRAINING] = Field(
        default=[0.9, 0.99],
        min_length=2,
        max_length=2,
        description="Shares of the momentum in the update and in the next momentum.",
    )
    weight_decay: Annotated[float, _TRAINING] = Field(
        3e-4, ge=0, description="Decoupled weight decay, multiplied by the learning rate."
    )


class MuonConfig(_Adam):
    """Muon (Jordan 2024), torch's own: the momentum of each matrix, made orthogonal. Needs torch 2.9. Tensors that are
    no matrices, which only `method.kind: full` trains, get AdamW with `betas` and `eps`.
    """

    moments = False
    kind: Annotated[Literal["muon"], _TRAINING] = Field(
        "muon", description="Half of AdamW's state, but more computation and a wait for the device in each step."
    )
    momentum: Annotated[float, _TRAINING] = Field(0.95, ge=0, lt=1, description="Decay rate of the momentum.")
    nesterov: Annotated[bool, _TRAINING] = Field(True, description="Use Nesterov's momentum.")
    ns_steps: Annotated[int, _TRAINING] = Field(
        5, ge=1, lt=100, description="Newton-Schulz iterations, which make the update orthogonal."
    )


class AdafactorConfig(OptimizerSection):
    """Adafactor (Shazeer & Stern 2018), torch's own: second moments from one value per row and per column. A matrix
    moves by lr times the larger of its own root mean square and `smallest_scale`.
    """

    moments = False
    kind: Annotated[Literal["adafactor"], _TRAINING] = Field(
        "adafactor", description="Next to no state; three waits for the device per matrix and step."
    )
    lr: Annotated[float, _TRAINING] = Field(
        1e-2, gt=0, description="Peak learning rate, relative to the size of the weights."
    )
    smallest_scale: Annotated[float, _TRAINING] = Field(
        1e-2,
        gt=0,
        description="Smallest size of the weights in that product, so that LoRA's B, which starts at 0, can move: at "
        "first by `lr` times this, 1e-4 as set here.",
    )
    beta2_decay: Annotated[float, _TRAINING] = Field(
        -0.8, le=0, description="Exponent of the step number in 1 - beta2, which falls from 1."
    )
    clip: Annotated[float, _TRAINING] = Field(1.0, ge=1, description="Largest root mean square of an update.")
    weight_decay: Annotated[float, _TRAINING] = Field(
        0.0, ge=0, description="Decoupled weight decay, multiplied by the learning rate."
    )


class ScheduleFreeConfig(_Adam):
    """Schedule-free AdamW (Defazio et al. 2024): averaged weights instead of a schedule. Needs
    `sd3tune[schedulefree]`. The average is previewed, measured and saved.
    """

    replaces_schedule = True
    kind: Annotated[Literal["schedulefree"], _TRAINING] = Field(
        "schedulefree", description="Needs no schedule and no number of steps; as much state as AdamW."
    )
    lr: Annotated[float, _TRAINING] = Field(
        2.5e-4, gt=0, description="Learning rate, one to ten times AdamW's with a schedule."
    )
    betas: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], _TRAINING] = Field(
        default=[0.9, 0.999],
        min_length=2,
        max_length=2,
        description="Share of the average in the weights that gradients are computed at, and the decay rate of the "
        "second moment.",
    )
    r: Annotated[float, _TRAINING] = Field(
        0.0, ge=0, description="Power of the step number in the weights of the average; above 0 favours later steps."
    )
    weight_lr_power: Annotated[float, _TRAINING] = Field(
        2.0, ge=0, description="Power of the largest learning rate so far in those weights, for the warm-up."
    )


class PagedAdamW8bitConfig(_Adam):
    """bitsandbytes' PagedAdamW8bit: `adamw8bit` whose moments a GPU that runs full can move to system memory. Needs
    `sd3tune[bitsandbytes]`. On the CPU it keeps them in ordinary memory.
    """

    moments = False
    kind: Annotated[Literal["paged_adamw8bit"], _TRAINING] = Field(
        "paged_adamw8bit", description="Survives short peaks of memory; waits for the device in each step."
    )


OptimizerConfig = Annotated[
    AdamWConfig
    | AdamW8bitConfig
    | ProdigyConfig
    | LionConfig
    | MuonConfig
    | AdafactorConfig
    | ScheduleFreeConfig
    | PagedAdamW8bitConfig,
    Field(discriminator="kind"),
]

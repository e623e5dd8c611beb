"""`optimizer` and `schedule`: how weights are updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sd3tune.config.sections.section import Section


class _Adam(Section):
    """What all of Adam's kin have."""

    kind: str
    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.999], min_length=2, max_length=2, description="Decay rates of the two moments."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(1e-4, ge=0, description="Decoupled weight decay, multiplied by the learning rate.")


class AdamWConfig(_Adam):
    """AdamW (Loshchilov & Hutter 2019), fused."""

    kind: Literal["adamw"] = Field("adamw", description="Fused AdamW on one flat fp32 master.")


class AdamW8bitConfig(_Adam):
    """AdamW with moments of 8 bits in blocks of 256 (Dettmers et al. 2022). Needs `sd3tune[bitsandbytes]`."""

    kind: Literal["adamw8bit"] = Field(
        "adamw8bit", description="6 bytes less for each trained parameter: 60 to 140 MB for a LoRA of rank 16."
    )


class ProdigyConfig(_Adam):
    """Prodigy (Mishchenko & Defazio 2024): AdamW that estimates its learning rate, d, while it trains."""

    kind: Literal["prodigy"] = Field("prodigy", description="No learning rate to choose; twice AdamW's memory.")
    lr: float = Field(1.0, gt=0, description="Multiplies the estimated rate, as the schedule does; leave it at 1.")
    d0: float = Field(
        1e-6, gt=0, description="The first estimate; it only grows, so below any rate that could be right."
    )
    d_coef: float = Field(1.0, gt=0, description="Multiplies each new estimate: 0.5 trains more calmly, 2 faster.")
    safeguard_warmup: bool = Field(True, description="Keep a schedule's warm-up from inflating the estimate.")
    use_bias_correction: bool = Field(
        True, description="Adam's correction of the first steps; makes Prodigy start slower."
    )


OptimizerConfig = Annotated[AdamWConfig | AdamW8bitConfig | ProdigyConfig, Field(discriminator="kind")]


class ConstantConfig(Section):
    """The same learning rate throughout, after the warm-up."""

    kind: Literal["constant"] = Field("constant", description="Constant learning rate.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly to its peak.")


class CosineConfig(Section):
    """Half a cosine from the peak to zero, after the warm-up."""

    kind: Literal["cosine"] = Field("cosine", description="Cosine decay to zero at the last step.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly to its peak.")


ScheduleConfig = Annotated[ConstantConfig | CosineConfig, Field(discriminator="kind")]

"""`optimizer` and `schedule`: how weights are updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sd3tune.config.sections.section import Section


class AdamWConfig(Section):
    """AdamW (Loshchilov & Hutter 2019), fused."""

    kind: Literal["adamw"] = Field("adamw", description="Fused AdamW on one flat fp32 master.")
    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.999], min_length=2, max_length=2, description="Decay rates of the two moments."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(1e-4, ge=0, description="Decoupled weight decay, multiplied by the learning rate.")


OptimizerConfig = AdamWConfig


class ConstantConfig(Section):
    """The same learning rate throughout, after the warm-up."""

    kind: Literal["constant"] = Field("constant", description="Constant learning rate.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly to its peak.")


class CosineConfig(Section):
    """Half a cosine from the peak to zero, after the warm-up."""

    kind: Literal["cosine"] = Field("cosine", description="Cosine decay to zero at the last step.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly to its peak.")


ScheduleConfig = Annotated[ConstantConfig | CosineConfig, Field(discriminator="kind")]

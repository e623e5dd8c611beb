"""Section `schedule`: the learning rate over the steps."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from sd3tune.config.sections.key import WRITTEN
from sd3tune.config.sections.section import Section

_LAST: Any = Field(0.0, ge=0, lt=1, description="Learning rate at the end of the run, as a share of the peak.")


class ScheduleSection(Section):
    """Fields shared by all schedules."""

    kind: str
    warmup_steps: Annotated[int, WRITTEN] = Field(
        0, ge=0, description="Steps over which the learning rate rises linearly to its peak."
    )
    depends_on_length: ClassVar[bool] = True
    """True if learning rates depend on the length of the run, which then cannot be extended."""


class ConstantConfig(ScheduleSection):
    """Constant learning rate after the warm-up."""

    kind: Annotated[Literal["constant"], WRITTEN] = Field("constant", description="Constant learning rate.")
    depends_on_length: ClassVar[bool] = False


class CosineConfig(ScheduleSection):
    """Half a cosine from the peak to zero after the warm-up."""

    kind: Annotated[Literal["cosine"], WRITTEN] = Field("cosine", description="Cosine decay to zero at the last step.")


class LinearConfig(ScheduleSection):
    """A line from the peak to `last` after the warm-up."""

    kind: Annotated[Literal["linear"], WRITTEN] = Field("linear", description="Linear decay.")
    last: Annotated[float, WRITTEN] = _LAST


class PolynomialConfig(ScheduleSection):
    """last + (1 - last) (1 - progress)^power of the peak after the warm-up."""

    kind: Annotated[Literal["polynomial"], WRITTEN] = Field("polynomial", description="Polynomial decay.")
    power: Annotated[float, WRITTEN] = Field(
        2.0, gt=0, description="1 is linear; above 1, the rate falls early, below 1 late."
    )
    last: Annotated[float, WRITTEN] = _LAST


class CosineRestartsConfig(ScheduleSection):
    """Half a cosine from the peak to zero, `cycles` times, each from the peak (Loshchilov & Hutter 2017)."""

    kind: Annotated[Literal["cosine_restarts"], WRITTEN] = Field(
        "cosine_restarts", description="Cosine decay that returns to the peak."
    )
    cycles: Annotated[int, WRITTEN] = Field(3, ge=1, description="Number of decays, of equal length; 1 is `cosine`.")


class WarmupStableDecayConfig(ScheduleSection):
    """The peak after the warm-up, then a decay to `last` over the final `decay` of the steps (Hu et al. 2024)."""

    kind: Annotated[Literal["warmup_stable_decay"], WRITTEN] = Field(
        "warmup_stable_decay", description="Constant learning rate, with a decay at the end."
    )
    decay: Annotated[float, WRITTEN] = Field(
        0.2, gt=0, le=1, description="Share of the steps after the warm-up in which the rate falls."
    )
    shape: Annotated[Literal["linear", "cosine", "1-sqrt"], WRITTEN] = Field(
        "linear",
        description="Form of the decay, for the share p of it: 1 - p, (1 + cos(pi p)) / 2 or 1 - sqrt(p) (Haegele et "
        "al. 2024).",
    )
    last: Annotated[float, WRITTEN] = _LAST


ScheduleConfig = Annotated[
    ConstantConfig | CosineConfig | LinearConfig | PolynomialConfig | CosineRestartsConfig | WarmupStableDecayConfig,
    Field(discriminator="kind"),
]

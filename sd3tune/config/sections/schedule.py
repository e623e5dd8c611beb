"""Section `schedule`: the learning rate over the steps."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sd3tune.config.sections.key import WRITTEN
from sd3tune.config.sections.section import Section


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


ScheduleConfig = Annotated[ConstantConfig | CosineConfig, Field(discriminator="kind")]

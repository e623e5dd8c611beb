"""`data.stream`: images that are read and encoded while training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sd3tune.config.sections.key import CONTENT, FREE
from sd3tune.config.sections.section import Section


class StreamConfig(Section):
    """How streams are shuffled, which faults they may have, and what is kept of them."""

    buffer: Annotated[int, CONTENT] = Field(
        4,
        ge=1,
        description="Number of shards whose samples are shuffled together. Their order is drawn from the seed, too. A "
        "process keeps this many remote shards, and the next ones, as files in the store's folder.",
    )
    max_broken: Annotated[int, FREE] = Field(
        100,
        ge=0,
        description="Number of different broken samples that a process passes over, each with a warning. One more "
        "ends the training.",
    )
    store_gb: Annotated[float, FREE] = Field(
        0.0,
        ge=0,
        description="Size of the store in GB (10^9 bytes) up to which it keeps what is encoded, for the next time that "
        "it comes. 0 keeps nothing.",
    )

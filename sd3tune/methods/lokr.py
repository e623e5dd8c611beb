"""LoKr on the transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from peft.tuners.lokr.layer import factorization
from peft.tuners.lycoris_utils import LycorisConfig

from sd3tune.config.schema import Config
from sd3tune.config.sections.method import LokrConfig
from sd3tune.methods.lycoris import LycorisMethod
from sd3tune.model.base.base import Base
from sd3tune.model.lora.layers import Layer
from sd3tune.model.lora.lycoris import lokr


class LokrMethod(LycorisMethod):
    """See `methods.base.Method`."""

    def __init__(self, config: Config, base: Base | None = None) -> None:
        super().__init__(config, base)
        self.products = cast(LokrConfig, config.method)

    def peft_config(self, layers: Mapping[str, Layer]) -> LycorisConfig:
        return lokr(layers, self.products.factor, self.products.decompose_both)

    def parameters_of_layer(self, rank: int, inputs: int, outputs: int) -> int:
        rows, columns = (factorization(size, self.products.factor) for size in (outputs, inputs))
        small, large = ((rows[place], columns[place]) for place in (0, 1))
        of_small = rank * sum(small) if self.products.decompose_both and rank < max(small) / 2 else small[0] * small[1]
        return of_small + (rank * sum(large) if rank < max(large) / 2 else large[0] * large[1])

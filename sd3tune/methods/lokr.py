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

    def shapes(self, rank: int, inputs: int, outputs: int) -> dict[str, tuple[int, int]]:
        rows, columns = (factorization(size, self.products.factor) for size in (outputs, inputs))
        found: dict[str, tuple[int, int]] = {}
        for name, height, width, may_be_low in (
            ("lokr_w1", rows[0], columns[0], self.products.decompose_both),
            ("lokr_w2", rows[1], columns[1], True),
        ):
            is_low = may_be_low and rank < max(height, width) / 2
            found |= {f"{name}_a": (height, rank), f"{name}_b": (rank, width)} if is_low else {name: (height, width)}
        return found

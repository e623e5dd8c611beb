"""LoHa on the transformer."""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.lycoris_utils import LycorisConfig

from sd3tune.methods.lycoris import LycorisMethod
from sd3tune.model.lora.layers import Layer
from sd3tune.model.lora.lycoris import loha


class LohaMethod(LycorisMethod):
    """See `methods.base.Method`."""

    def peft_config(self, layers: Mapping[str, Layer]) -> LycorisConfig:
        return loha(layers)

    def shapes(self, rank: int, inputs: int, outputs: int) -> dict[str, tuple[int, int]]:
        left, right = (outputs, rank), (rank, inputs)
        return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}

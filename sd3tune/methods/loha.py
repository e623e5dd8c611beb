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

    def parameters_of_layer(self, rank: int, inputs: int, outputs: int) -> int:
        return 2 * rank * (inputs + outputs)

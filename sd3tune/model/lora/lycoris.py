"""LoHa and LoKr on the transformer: initialization of their layers, which PEFT creates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft import LoHaConfig, LoKrConfig
from peft.tuners.lycoris_utils import LycorisConfig
from torch import Tensor, nn

from sd3tune.model.lora.dropout import SeededDropout
from sd3tune.model.lora.layers import ADAPTER_NAME, Layer, adapter_layers, most_common, parameters_of

Draw = Callable[[Tensor, torch.Generator], object]
"""Fills a part, which is zero, with initial values from the generator."""


def _kaiming(part: Tensor, source: torch.Generator) -> None:
    nn.init.kaiming_uniform_(part, a=math.sqrt(5), generator=source)


def _normal(std: float) -> Draw:
    return lambda part, source: part.normal_(0, std, generator=source)


def _zero(part: Tensor, source: torch.Generator) -> None:
    """Leave the part at zero."""


INITS: dict[bool | str, Mapping[str, Draw]] = {
    True: {"hada_w2_b": _zero, "lokr_w1": _zero, "lokr_w1_a": _zero},
    "lycoris": {
        "hada_w1_a": _normal(0.1), "hada_w1_b": _normal(1), "hada_w2_a": _zero, "hada_w2_b": _normal(1),
        "lokr_w2": _zero, "lokr_w2_b": _zero,
    },
}  # fmt: skip
"""Part -> its initial values, as in PEFT (true) and in LyCORIS; the others are Kaiming-uniform. The update is zero."""


def loha(layers: Mapping[str, Layer]) -> LycorisConfig:
    """Return PEFT's configuration of LoHa in the modules of `layers`."""
    common = most_common(layers)
    return LoHaConfig(r=common.rank, alpha=common.alpha, target_modules=list(layers), **_patterns(layers))


def lokr(layers: Mapping[str, Layer], factor: int, decompose_both: bool) -> LycorisConfig:
    """Return PEFT's configuration of LoKr in the modules of `layers`."""
    common = most_common(layers)
    return LoKrConfig(
        r=common.rank, alpha=common.alpha, target_modules=list(layers), **_patterns(layers),
        decompose_factor=factor, decompose_both=decompose_both,
    )  # fmt: skip


def _patterns(layers: Mapping[str, Layer]) -> dict[str, dict[str, float]]:
    common = most_common(layers)
    return {
        "rank_pattern": {f"^{name}": layer.rank for name, layer in layers.items() if layer.rank != common.rank},
        "alpha_pattern": {f"^{name}": layer.alpha for name, layer in layers.items() if layer.alpha != common.alpha},
    }


def inject_lycoris(
    transformer: SD3Transformer2DModel,
    config: LycorisConfig,
    generator: Callable[[str], torch.Generator],
    *,
    init: bool | str = True,
    dropout: float = 0.0,
) -> dict[str, nn.Parameter]:
    """Add layers as PEFT's `config` says. Return their fp32 parameters, `<module>.<part>`; all else is frozen.

    Parts are drawn in fp32 from `generator(module)`. The update is zero at the start.
    """
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # PEFT draws values, too, which are replaced
        transformer.add_adapter(config, adapter_name=ADAPTER_NAME)
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in adapter_layers(transformer).items():
        layer.training = False  # else PEFT draws in each step whether to leave the layer out, at a share of 0
        source = generator(name)
        for part, parameter in parameters_of(layer).items():
            value = torch.zeros(parameter.shape)
            INITS[init].get(part, _kaiming)(value, source)
            parameter.data = value.to(parameter.device)
            parameters[f"{name}.{part}"] = parameter
        if dropout:
            _drop_inputs(layer, SeededDropout(dropout, name))
    return parameters


def _drop_inputs(layer: Any, dropout: SeededDropout) -> None:
    """Let a layer's update see dropped inputs while the dropout is drawn; PEFT has none for LoHa and LoKr."""
    layer.input_dropout = dropout

    def use_dropped(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not dropout.is_drawn or layer.disable_adapters:
            return output
        change = dropout(inputs[0]) - inputs[0]
        return output + nn.functional.linear(change, layer.get_delta_weight(ADAPTER_NAME))

    layer.register_forward_hook(use_dropped)

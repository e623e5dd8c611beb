"""LoHa and LoKr on the transformer: initialization of their layers, which PEFT creates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from diffusers import SD3Transformer2DModel
from peft import LoHaConfig, LoKrConfig
from peft.tuners.lycoris_utils import LycorisConfig
from torch import nn

from sd3tune.model.lora.layers import ADAPTER_NAME, Layer, adapter_layers, most_common, parameters_of

ZERO = ("hada_w2_b", "lokr_w1", "lokr_w1_a")
"""Parts that are zero at the start, as PEFT has them; the others are Kaiming-uniform."""


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
    transformer: SD3Transformer2DModel, config: LycorisConfig, generator: Callable[[str], torch.Generator]
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
            if part not in ZERO:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=source)
            parameter.data = value.to(parameter.device)
            parameters[f"{name}.{part}"] = parameter
    return parameters

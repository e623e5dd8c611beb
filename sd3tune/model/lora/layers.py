"""LoRA on a model: rank, scale and initialization of its layers, which PEFT creates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection

from sd3tune.model.lora.dropout import SeededDropout
from sd3tune.model.lora.targets import block_of

ADAPTER_NAME = "default"
MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name of DoRA's magnitudes."""


@dataclass(frozen=True)
class Layer:
    """The adapter of one module, which adds `scale` B A to the module's weight."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) when rank-stabilised (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


Init = Callable[[int, int, int, torch.Generator], "tuple[Tensor, Tensor]"]
"""(rank, in_features, out_features, generator) -> A [rank, in], B [out, rank], fp32 on the CPU, with B A = 0."""


def kaiming(rank: int, features: int, outputs: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return PEFT's default: A from U(-b, b), b = 1 / sqrt(features), and B zero."""
    down = torch.empty(rank, features)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=source)
    return down, torch.zeros(outputs, rank)


def gaussian(rank: int, features: int, outputs: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return PEFT's `gaussian`: A normal with standard deviation 1 / rank, and B zero."""
    return torch.randn(rank, features, generator=source) / rank, torch.zeros(outputs, rank)


def orthogonal(rank: int, features: int, outputs: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return PEFT's `orthogonal`: A's columns and B's rows lie in orthogonal halves of R^rank, and neither is zero.

    So B A is zero up to rounding in the dtype of the factors: about 1e-8 in fp32, 1e-3 of |B| |A| in bf16.
    """
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, generator=source).double())
    down = torch.randn(features, rank // 2, generator=source).double() @ basis[0::2] / 10
    up = torch.randn(outputs, rank // 2, generator=source).double() @ basis[1::2] / 10
    return down.T.float().contiguous(), up.float()


INITS: dict[bool | str, Init] = {True: kaiming, "gaussian": gaussian, "orthogonal": orthogonal, "eva": kaiming}
"""`eva` replaces A later, from training data (see `eva.input_directions`)."""


def inject_lora(
    model: SD3Transformer2DModel | CLIPTextModelWithProjection,
    layers: Mapping[str, Layer],
    generator: Callable[[str], torch.Generator],
    *,
    init: bool | str = True,
    dropout: float = 0.0,
    dora: bool = False,
) -> dict[str, nn.Parameter]:
    """Add LoRA layers to the modules of `layers`. Return their fp32 parameters, `<module>.lora_A` and `.lora_B`.

    Factors are drawn in fp32 from `generator(module)`, so the initialization does not depend on the base's dtype or on
    global state. With `dora`, `<module>.lora_magnitude_vector` [out] follows, in the base's dtype.
    """
    common = most_common(layers)
    config = LoraConfig(
        r=common.rank,
        lora_alpha=common.alpha,
        target_modules=list(layers),
        rank_pattern={f"^{name}": layer.rank for name, layer in layers.items() if layer.rank != common.rank},
        alpha_pattern={f"^{name}": layer.alpha for name, layer in layers.items() if layer.alpha != common.alpha},
        use_rslora=common.rslora,
        init_lora_weights=False,
        use_dora=dora,
    )
    model.requires_grad_(False)
    model.add_adapter(config, adapter_name=ADAPTER_NAME)
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in lora_layers(model).items():
        down, up = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        factors = INITS[init](down.shape[0], down.shape[1], up.shape[0], generator(name))
        down.data, up.data = (factor.to(up.device) for factor in factors)
        if dropout:
            layer.lora_dropout[ADAPTER_NAME] = SeededDropout(dropout, name)
        parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"] = down, up
        if dora:
            parameters[f"{name}.{MAGNITUDE}"] = layer.lora_magnitude_vector[ADAPTER_NAME].weight
    return parameters


def most_common(layers: Mapping[str, Layer]) -> Layer:
    """Return the most common layer, so that patterns need to name only the others."""
    return Counter(layers.values()).most_common(1)[0][0]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the modules with adapters, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_layers(transformer: nn.Module) -> dict[str, BaseTunerLayer]:
    """Return the modules with adapters of any kind, by full name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}


def parameters_of(layer: Any, adapter: str = ADAPTER_NAME) -> dict[str, nn.Parameter]:
    """Return the parameters of a layer's adapter by PEFT's name of the part, such as `lora_A`."""
    found = {part: getattr(layer, part) for part in layer.adapter_layer_names}
    held = {part: holder[adapter] for part, holder in found.items() if adapter in holder}
    return {part: one if isinstance(one, nn.Parameter) else one.weight for part, one in held.items()}


@contextmanager
def other_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute with other parameters, `<module>.<part>`, whose scale is folded in, inside the context.

    Parameters are repointed and restored: the live values are never written to.
    """
    live: list[tuple[nn.Parameter, Tensor]] = []
    layers: dict[str, Any] = {**adapter_layers(model)}
    scales = {name: layer.scaling[ADAPTER_NAME] for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            for part, parameter in parameters_of(layer).items():
                live.append((parameter, parameter.data))
                parameter.data = tensors[f"{name}.{part}"].to(parameter.dtype)
            layer.scaling[ADAPTER_NAME] = 1.0
        yield
    finally:
        for parameter, data in live:
            parameter.data = data
        for name, layer in layers.items():
            layer.scaling[ADAPTER_NAME] = scales[name]


def block_norms(factors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return block -> Frobenius norm of BA over its modules, without forming BA: |BA|^2 = sum((B^T B) * (A A^T))."""
    squares: dict[str, float] = {}
    for name, down in factors.items():
        if name.endswith(".lora_A"):
            up = factors[name.removesuffix("A") + "B"]
            a, b = (factor.cpu().double() for factor in (down, up))  # a Mac's GPU has no float64
            block = block_of(name)
            squares[block] = squares.get(block, 0.0) + ((b.T @ b) * (a @ a.T)).sum().item()
    return {block: max(square, 0.0) ** 0.5 for block, square in squares.items()}


def norms_by_block(updates: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """Return block -> Frobenius norm over its modules, from (module, update of its weight)."""
    squares: dict[str, float] = {}
    for name, update in updates:
        block = block_of(name)
        squares[block] = squares.get(block, 0.0) + update.cpu().double().square().sum().item()
    return {block: square**0.5 for block, square in squares.items()}

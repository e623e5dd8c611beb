"""LoRA on the transformer: which modules, how they start, and what was covered. PEFT makes the layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from sd3tune.errors import AdapterError

ADAPTER_NAME = "default"

ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
)
"""Every projection of the MMDiT's attention: image stream, context stream, and SD3.5-medium's second attention.

`attn.to_q` as an ending does not match `attn2.to_q`, which is why the latter stand here by name.
"""


@dataclass(frozen=True)
class CoverageRow:
    """One kind of projection: in how many blocks it exists, in how many it is trained, at how many parameters."""

    module: str
    trained: int
    present: int
    parameters: int


def select_modules(transformer: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear modules to train, in the model's order.

    `targets` is "attention" or a list of module names or endings. Modules that can never learn are left out.
    Raises AdapterError when an entry of the list matches nothing, or nothing that can learn.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    never = _never_learning(transformer)
    if targets == "attention":
        return [name for name in linear if name not in never and _ends_with(name, ATTENTION)]
    problems = []
    for target in targets:
        matches = [name for name in linear if _ends_with(name, (target,))]
        if not matches:
            problems.append(f"method.targets: {target!r} matches no linear module of the transformer; {_kinds(linear)}")
        elif all(name in never for name in matches):
            problems.append(f"method.targets: {target!r} matches only {matches[0]}, whose output nothing reads")
    if problems:
        raise AdapterError(*problems)
    return [name for name in linear if name not in never and _ends_with(name, targets)]


def coverage(transformer: nn.Module, modules: Sequence[str], rank: int) -> list[CoverageRow]:
    """What `modules` are, grouped by their place in a block; for a table at the start of a run."""
    chosen = set(modules)
    rows: dict[str, CoverageRow] = {}
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        kind = _kind(name)
        row = rows.get(kind, CoverageRow(kind, 0, 0, 0))
        parameters = rank * (module.in_features + module.out_features) if name in chosen else 0
        rows[kind] = CoverageRow(kind, row.trained + (name in chosen), row.present + 1, row.parameters + parameters)
    return [row for row in rows.values() if row.trained]


def inject_lora(
    transformer: SD3Transformer2DModel,
    modules: Sequence[str],
    rank: int,
    alpha: float,
    generator: Callable[[str], torch.Generator],
) -> dict[str, nn.Parameter]:
    """Add LoRA layers to `modules` and return their parameters, fp32, named `<module>.lora_A` and `.lora_B`.

    A is drawn as PEFT does (Kaiming uniform, a = sqrt 5) but in fp32 whatever the base's dtype and from
    `generator(module)`, so the start depends on neither dtype nor global state; B is zero.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules), init_lora_weights=False)
    transformer.requires_grad_(False)
    transformer.add_adapter(config, adapter_name=ADAPTER_NAME)
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in lora_layers(transformer).items():
        down, up = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        down.data = torch.empty(down.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(down.data, a=math.sqrt(5), generator=generator(name))
        down.data = down.data.to(up.device)
        up.data = torch.zeros(up.shape, dtype=torch.float32, device=up.device)
        parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"] = down, up
    return parameters


def lora_layers(transformer: nn.Module) -> dict[str, LoraLayer]:
    """The modules that carry adapters, by full name."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def _ends_with(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _never_learning(transformer: nn.Module) -> set[str]:
    """The last block drops its context stream, so the context's query there gets a gradient of exactly zero."""
    return {
        f"{name}.attn.add_q_proj"
        for name, block in transformer.named_modules()
        if getattr(block, "context_pre_only", None) is True and hasattr(block, "attn")
    }


def _kind(name: str) -> str:
    return re.sub(r"^transformer_blocks\.\d+\.", "", name)


def _kinds(linear: Sequence[str]) -> str:
    return "its modules are " + ", ".join(dict.fromkeys(_kind(name) for name in linear))

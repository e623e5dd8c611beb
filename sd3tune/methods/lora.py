"""LoRA on the transformer; the text encoders stay frozen and their output comes from the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.config.schema import Config
from sd3tune.methods.base import Embeddings, Weights
from sd3tune.model import adapter_io
from sd3tune.model.adapters import ADAPTER_NAME, inject_lora, lora_layers, select_modules
from sd3tune.model.text import assemble


class LoraMethod:
    """See `methods.base.Method`."""

    resident: tuple[str, ...] = ("transformer",)

    def __init__(self, config: Config) -> None:
        self.settings = config.method
        self.t5_length = config.model.max_sequence_length
        self.cached_encoders: tuple[str, ...] = ("clip_l", "clip_g", "t5") if config.model.t5 else ("clip_l", "clip_g")

    def select(self, transformer: nn.Module) -> list[str]:
        return select_modules(transformer, self.settings.targets)

    def inject(
        self, transformer: SD3Transformer2DModel, generator: Callable[[str], torch.Generator]
    ) -> dict[str, nn.Parameter]:
        modules = self.select(transformer)
        return inject_lora(transformer, modules, self.settings.rank, self.settings.alpha, generator)

    def conditioning(self, embeddings: Embeddings, transformer: SD3Transformer2DModel) -> tuple[Tensor, Tensor]:
        prompt_embeds, pooled = assemble(
            embeddings["clip_l"],
            embeddings["clip_g"],
            embeddings["t5"]["hidden"] if "t5" in embeddings else None,
            self.t5_length,
            transformer.config.joint_attention_dim,
        )
        dtype = next(transformer.parameters()).dtype  # `transformer.dtype` walks the whole model to find out
        return prompt_embeds.to(dtype), pooled.to(dtype)

    def exported(self, weights: Weights) -> dict[str, Tensor]:
        return adapter_io.fold_scale(weights, self.settings.alpha / self.settings.rank)

    @contextmanager
    def as_exported(self, transformer: SD3Transformer2DModel, weights: Weights) -> Iterator[None]:
        # Parameters are pointed elsewhere and back: the live values are never written to.
        tensors = self.exported(weights)
        live: list[tuple[nn.Parameter, Tensor]] = []
        layers = lora_layers(transformer)
        try:
            for name, layer in layers.items():
                for parameter, value in (
                    (layer.lora_A[ADAPTER_NAME].weight, tensors[f"{name}.lora_A"]),
                    (layer.lora_B[ADAPTER_NAME].weight, tensors[f"{name}.lora_B"]),
                ):
                    live.append((parameter, parameter.data))
                    parameter.data = value.to(parameter.dtype)
                layer.scaling[ADAPTER_NAME] = 1.0
            yield
        finally:
            for parameter, data in live:
                parameter.data = data
            for layer in layers.values():
                layer.set_scale(ADAPTER_NAME, 1)

    @contextmanager
    def disabled(self, transformer: SD3Transformer2DModel) -> Iterator[None]:
        transformer.disable_adapters()
        try:
            yield
        finally:
            transformer.enable_adapters()

    def export(self, folder: Path, weights: Weights, contract: Mapping[str, Any]) -> Path:
        return adapter_io.write_adapter(folder, self.exported(weights), contract)

    def contract(self) -> dict[str, Any]:
        return {"method": "lora", "rank": self.settings.rank, "alpha": self.settings.alpha}

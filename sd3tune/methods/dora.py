"""DoRA on the transformer: LoRA gives each layer its direction, and a magnitude per output is trained beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.adapter.dora import decomposed
from sd3tune.methods.base import Weights
from sd3tune.methods.lora import LoraMethod
from sd3tune.model.compute.sharding import gathered
from sd3tune.model.load.quantized import dtype_of, weights_of
from sd3tune.model.lora.layers import ADAPTER_NAME, MAGNITUDE, lora_layers, norms_by_block


class DoraMethod(LoraMethod):
    """See `methods.base.Method`. Layers compute with m (W + s B A) / |W + s B A|, norms and m per output."""

    dora = True

    def parameters_of_layer(self, rank: int, inputs: int, outputs: int) -> int:
        return super().parameters_of_layer(rank, inputs, outputs) + outputs

    def inject(
        self, transformer: SD3Transformer2DModel, generator: Callable[[str], torch.Generator]
    ) -> dict[str, nn.Parameter]:
        parameters = super().inject(transformer, generator)
        known = self._start.magnitudes if self._start else {}
        started = self._start.factors if self._start else {}
        for name, layer in lora_layers(transformer).items():
            parameter = parameters[f"{name}.{MAGNITUDE}"]
            weight = weights_of(layer.base_layer, dtype_of(layer.base_layer)).float()
            if name in started:  # a plain LoRA has the norm of its sum
                update = parameters[f"{name}.lora_B"].detach() @ parameters[f"{name}.lora_A"].detach()
                weight = weight + layer.scaling[ADAPTER_NAME] * update
            layer.training = False  # PEFT then adds to the layer's own result, as it does without dropout
            parameter.data = known[name].float().to(parameter.device) if name in known else weight.norm(dim=1)
        return parameters

    @contextmanager
    def regularised(self, transformer: SD3Transformer2DModel, seed: int) -> Iterator[None]:
        layers = lora_layers(transformer).values() if self.settings.dropout else ()
        try:
            for layer in layers:
                layer.training = True  # PEFT drops no inputs of DoRA otherwise
            with super().regularised(transformer, seed):
                yield
        finally:
            for layer in layers:
                layer.training = False

    def block_changes(self, transformer: SD3Transformer2DModel, weights: Weights) -> dict[str, float]:
        tensors = self.exported(weights)
        return norms_by_block(self._changes(transformer, tensors)) | self.text.changes(tensors)

    def _changes(self, transformer: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
        for name, layer in lora_layers(transformer).items():
            weight = gathered(weights_of(layer.base_layer, torch.float32)).cpu()
            down, up, magnitude = (tensors[f"{name}.{part}"].float().cpu() for part in ("lora_A", "lora_B", MAGNITUDE))
            yield name, decomposed(weight, up @ down, magnitude) - weight

"""The common part of LoHa and LoKr, whose layers are PEFT's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft.tuners.lycoris_utils import LycorisConfig
from torch import Tensor, nn

from sd3tune.adapter.file import Adapter
from sd3tune.adapter.lycoris import product, scaled
from sd3tune.adapter.write import write_lycoris
from sd3tune.methods.base import Weights
from sd3tune.methods.lora import LoraMethod
from sd3tune.methods.start_from import check_lycoris_start
from sd3tune.model.lora.layers import Layer, norms_by_block
from sd3tune.model.lora.lycoris import inject_lycoris


class LycorisMethod(LoraMethod):
    """See `methods.base.Method`."""

    @abstractmethod
    def peft_config(self, layers: Mapping[str, Layer]) -> LycorisConfig:
        """Return PEFT's configuration of the layers."""

    @abstractmethod
    def shapes(self, rank: int, inputs: int, outputs: int) -> dict[str, tuple[int, int]]:
        """Return part -> its shape, for a linear layer of these sizes."""

    def parameters_of_layer(self, rank: int, inputs: int, outputs: int) -> int:
        return sum(rows * columns for rows, columns in self.shapes(rank, inputs, outputs).values())

    def _check_start(self, start: Adapter, transformer: nn.Module, layers: Mapping[str, Layer]) -> None:
        shapes = {}
        for name, layer in layers.items():
            module = transformer.get_submodule(name)
            assert isinstance(module, nn.Linear)
            shapes[name] = self.shapes(layer.rank, module.in_features, module.out_features)
        check_lycoris_start(start, transformer, shapes, self.settings.kind)

    def inject(
        self, transformer: SD3Transformer2DModel, generator: Callable[[str], torch.Generator]
    ) -> dict[str, nn.Parameter]:
        settings, layers = self.settings, self._layers(self.select(transformer))
        parameters = inject_lycoris(
            transformer, self.peft_config(layers), generator, init=settings.init, dropout=settings.dropout
        )
        for module, parts in self._start.lycoris.items() if self._start else ():
            if module in layers:
                for part, value in scaled(parts, 1 / layers[module].scale).items():
                    parameter = parameters[f"{module}.{part}"]
                    parameter.data = value.to(parameter.device)
        return parameters

    def rates(self, names: Iterable[str]) -> dict[str, float]:
        return {}

    def identity(self) -> dict[str, Any]:
        return {key: value for key, value in super().identity().items() if key != "start_from" or value}

    def _folded(self, weights: Weights) -> dict[str, Tensor]:
        parts = dict(_by_module(weights))
        layers = self._layers(list(parts))
        folded = {module: scaled(of, layers[module].scale) for module, of in parts.items()}
        return {f"{module}.{part}": value for module, of in folded.items() for part, value in of.items()}

    def block_changes(self, transformer: SD3Transformer2DModel, weights: Weights) -> dict[str, float]:
        parts = _by_module(self.exported(weights))
        return norms_by_block(
            (module, product({part: one.float() for part, one in of.items()})) for module, of in parts
        )

    def export(self, folder: Path, weights: Weights, contract: Mapping[str, Any]) -> Path:
        parts = dict(_by_module(self.exported(weights)))
        return write_lycoris(folder, parts, self.peft_config(self._layers(list(parts))), contract, self.export_dtype)


def _by_module(weights: Weights) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each module with its parts; the weights are sorted by module."""
    for module, names in groupby(weights, lambda name: name.rpartition(".")[0]):
        yield module, {name.rpartition(".")[2]: weights[name] for name in names}

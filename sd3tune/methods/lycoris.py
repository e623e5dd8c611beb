"""The common part of LoHa and LoKr, whose layers are PEFT's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft.tuners.lycoris_utils import LycorisConfig
from torch import Tensor, nn

from sd3tune.adapter.lycoris import product, scaled
from sd3tune.adapter.write import write_lycoris
from sd3tune.methods.base import Weights
from sd3tune.methods.lora import LoraMethod
from sd3tune.model.lora.layers import Layer, norms_by_block
from sd3tune.model.lora.lycoris import inject_lycoris


class LycorisMethod(LoraMethod):
    """See `methods.base.Method`."""

    _start = None

    @abstractmethod
    def peft_config(self, layers: Mapping[str, Layer]) -> LycorisConfig:
        """Return PEFT's configuration of the layers."""

    def inject(
        self, transformer: SD3Transformer2DModel, generator: Callable[[str], torch.Generator]
    ) -> dict[str, nn.Parameter]:
        return inject_lycoris(transformer, self.peft_config(self._layers(self.select(transformer))), generator)

    def rates(self, names: Iterable[str]) -> dict[str, float]:
        return {}

    def initialize_from_data(
        self, transformer: SD3Transformer2DModel, observe: Callable[[], object], reduce_mean: Callable[[Tensor], Tensor]
    ) -> None:
        """Do nothing: the initial weights do not depend on data."""

    @contextmanager
    def regularised(self, transformer: SD3Transformer2DModel, seed: int) -> Iterator[None]:
        yield

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

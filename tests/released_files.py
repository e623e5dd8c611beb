"""Files like the published ones, of which only the header is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import released_models

Tensors = Mapping[str, torch.Tensor]
# Billions of parameters of the published models.
PARAMETERS = {"sd3-medium": 2.028, "sd35-medium": 2.243, "sd35-large": 8.057, "vae": 0.084}


@pytest.fixture(scope="session")
def write_hollow() -> Callable[[Path, Tensors], Path]:
    """Writes a safetensors file of fp16 tensors without their bytes; see `released_models.write_hollow`."""

    def write(file: Path, tensors: Tensors) -> Path:
        return released_models.write_hollow(file, {name: tensor.half() for name, tensor in tensors.items()})

    return write


@pytest.fixture(scope="session")
def write_released(write_hollow, original_layout) -> Callable[[str, Path], Path]:
    """`write_released("sd35-medium", file)`: the names and shapes of that checkpoint as it is published."""

    def write(variant: str, file: Path) -> Path:
        transformer, vae = (released_models.empty_model(variant, part) for part in ("transformer", "vae"))
        assert (_billions(transformer), _billions(vae)) == (PARAMETERS[variant], PARAMETERS["vae"])
        return write_hollow(file, original_layout(transformer.state_dict(), vae.state_dict()))

    return write


def _billions(model: nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3)

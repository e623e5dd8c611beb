"""Files like the published ones, of which only the header is there."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn

from sd3tune.model.base.parts import COMMON, CONFIGS

Tensors = Mapping[str, torch.Tensor]
# Billions of parameters of the published models.
PARAMETERS = {"sd3-medium": 2.028, "sd35-medium": 2.243, "sd35-large": 8.057, "vae": 0.084}


@pytest.fixture(scope="session")
def write_hollow() -> Callable[[Path, Tensors], Path]:
    """Writes a safetensors file of fp16 tensors without their bytes: a hole in the disk, so no room is taken."""

    def write(file: Path, tensors: Tensors) -> Path:
        header, end = {}, 0
        for name, tensor in tensors.items():
            size = 2 * tensor.numel()
            header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(file, 8 + len(text) + end)
        return file

    return write


@pytest.fixture(scope="session")
def write_released(write_hollow, original_layout) -> Callable[[str, Path], Path]:
    """`write_released("sd35-medium", file)`: the names and shapes of that checkpoint as it is published."""

    def write(variant: str, file: Path) -> Path:
        with torch.device("meta"):
            transformer = SD3Transformer2DModel.from_config(_config(CONFIGS / variant / "transformer"))
            vae = AutoencoderKL.from_config(_config(COMMON / "vae"))
        assert (_billions(transformer), _billions(vae)) == (PARAMETERS[variant], PARAMETERS["vae"])
        return write_hollow(file, original_layout(transformer.state_dict(), vae.state_dict()))

    return write


def _config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config


def _billions(model: nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3)
